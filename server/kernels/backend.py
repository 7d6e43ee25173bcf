"""What a compute backend is: this protocol is the specification, reference.py says what its ops return.

A backend owns how weights, the KV cache and the rank arena lie in memory, so that a native kernel can pack at load time
and keep caches in a type of its own. Whatever is the same for all layers of a step it derives once, in ``begin_step``.
What it makes is opaque to everybody else. Above it stand the decoder, which checks a step and calls it, and the engine,
which knows of numbers only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeAlias, TypeVar

import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.server.kernels.kept import Keeper
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.sampling import NativeSampling, SamplingColumns
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import AdapterRanges, Ints, RankRange, StepBatch
from manylora.server.kernels.weights import DecoderWeights, EmbeddingWeight, LinearWeight


class WeightSource(Protocol):
    """A weight matrix as quant/ reads it: plain 16/32-bit, NF4, GPTQ or AWQ."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and zero points included."""
        ...

    @property
    def is_quantized(self) -> bool:
        """Whether it is held in fewer bits than it computes in."""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] matrix in ``dtype``, freshly allocated unless it is stored that way."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return the same matrix on ``device``."""
        ...


class KVCache(Protocol):
    """Keys and values of every layer, in blocks of ``block_size`` slots. It knows no owners.

    Block 0 is the null block, which is nobody's: those that sequences own are numbered from 1 to ``num_blocks``.
    """

    @property
    def num_blocks(self) -> int:
        """Blocks that can be given to sequences."""
        ...

    @property
    def block_size(self) -> int:
        """Slots of a block."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, the null block's included."""
        ...


class RankArena(Protocol):
    """What every adapter on the device adds: in each module an adapter owns a contiguous range of rank rows.

    Which ranges are free, the engine knows. Changed between steps only.
    """

    @property
    def rows(self) -> int:
        """Rank rows of each module."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all modules and layers."""
        ...

    def write(self, ranges: AdapterRanges, weights: AdapterWeights) -> None:
        """Copy an adapter's factors and gains into its ranges, which have a row more than its rank where it has gains.

        Rows that a layer doesn't use, because it isn't targeted or its rank is smaller, add nothing afterwards.
        """
        ...

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        """Do that in pieces of some hundred microseconds: one more each time that the iterator is asked to go on."""
        ...

    def move(self, module: str, source: RankRange, target_start: int) -> None:
        """Move a range to another start; the two may overlap."""
        ...

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        """Do that in pieces; until the last of them the range is nowhere whole."""
        ...

    def release(self, ranges: AdapterRanges) -> None:
        """Give back what memory an adapter had of its own beside rank rows: its vocabulary. It is gone for good."""
        ...


ModelT = TypeVar("ModelT")
"""A decoder's weights as the backend's kernels read them."""
PlanT = TypeVar("PlanT")
"""A step that has begun: its batch, and what the backend derived from it for all layers."""


class Backend(Protocol[ModelT, PlanT]):
    """Kernels for one device and one dtype. It keeps nothing of a step, so several decoders may share it.

    The five ops take a plan and the number of a layer. x is the residual stream, [n, hidden] with n ≥ T: rows from T
    on, if there are any, are the backend's own, and nobody reads them.
    """

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """In which type weights that are not quantised are read. Activations are handed from op to op in it or in
        float32."""
        ...

    @property
    def kv_dtype(self) -> torch.dtype:
        """In which type its KV caches hold keys and values; int8: with a scale for a few neighbours of a head, in
        which a token's are rounded before anybody reads them, its own step included."""
        ...

    @property
    def description(self) -> str:
        """What it is, and by what it multiplies 4-bit weights: for the banner."""
        ...

    def quantize_nf4(self, matrix: Tensor, *, double_quant: bool) -> WeightSource:
        """Return quant.nf4.quantize_nf4 of [out, in], which a backend may compute faster. Raises ValueError too."""
        ...

    def quantize_int8(self, matrix: Tensor) -> WeightSource:
        """Return quant.int8.quantize_int8 of [out, in] in the same way."""
        ...

    def prepare(self, parts: Sequence[WeightSource], bias: Tensor | None) -> LinearWeight:
        """Stack ``parts`` along out_features (q, k, v are one matmul) in the backend's layout, on its device.

        Of what isn't quantised nothing is kept, here and in the next two: it may be a file's own memory.
        """
        ...

    def prepare_embedding(self, matrix: Tensor, *, tied: bool) -> EmbeddingWeight:
        """Return [vocab, hidden] in the backend's layout, on its device. ``tied``: it will be the head too."""
        ...

    def prepare_head(self, matrix: WeightSource) -> LinearWeight:
        """Return a head of the model's own in the backend's layout, on its device."""
        ...

    def tie_head(self, embedding: EmbeddingWeight) -> LinearWeight:
        """Return the head of a model that ties it to its embedding: the same storage."""
        ...

    def rows(self, weight: LinearWeight, first: int, last: int) -> Iterator[Tensor]:
        """Yield rows [first, last) of a prepared matrix as it multiplies by them, float32 [n, in], a few at a time.

        Callable from any thread; a step may run meanwhile.
        """
        ...

    def bias(self, weight: LinearWeight) -> Tensor | None:
        """Return the bias that is added to a prepared matrix's products, [out]; callable from any thread."""
        ...

    @property
    def rows_form(self) -> str:
        """What ``rows`` of a checkpoint's matrices depend on beside how it is quantised, in a few words."""
        ...

    @property
    def keeper(self) -> Keeper | None:
        """How prepared weights are written down and read back; None: they aren't, and are prepared at each start."""
        ...

    def assemble(self, weights: DecoderWeights) -> ModelT:
        """Return the whole model, all of whose weights this backend has prepared, as ``begin_step`` takes it."""
        ...

    def block_bytes(self, shape: DecoderShape, block_size: int) -> int:
        """Return what one KV block takes in all layers."""
        ...

    def row_bytes(self, shape: DecoderShape) -> Mapping[str, int]:
        """Return what one rank row of each module takes over all layers."""
        ...

    def new_kv(self, shape: DecoderShape, num_blocks: int, block_size: int) -> KVCache:
        """Return an empty cache of ``num_blocks`` blocks and the null block."""
        ...

    def new_arena(self, shape: DecoderShape, rows: int) -> RankArena:
        """Return an arena with ``rows`` rank rows in each module, all zero."""
        ...

    def begin_step(self, model: ModelT, batch: StepBatch, kv: KVCache, arena: RankArena) -> PlanT:
        """Derive what all layers of a step share. ``kv`` and ``arena`` are this backend's; the batch was checked."""
        ...

    def embed(self, plan: PlanT) -> Tensor:
        """Return x: the embeddings of the step's tokens."""
        ...

    def attn_in(self, plan: PlanT, layer: int, x: Tensor) -> Tensor:
        """Return [n, (heads + 2 · KV heads) · head dim]: q, k, v of the normalised x, adapters' deltas added."""
        ...

    def attend(self, plan: PlanT, layer: int, qkv: Tensor) -> Tensor:
        """Write the tokens' keys and values to the cache; return what their queries attend to, [n, heads · head dim].

        q and k are normalised (where the family does that) and rotated by their positions first. A token sees its own
        sequence up to itself, within the layer's window. Of what another sequence wrote nothing is read, not even times
        zero.
        """
        ...

    def attn_out(self, plan: PlanT, layer: int, o: Tensor, x: Tensor) -> Tensor:
        """Return x + o projected, deltas added."""
        ...

    def mlp_in(self, plan: PlanT, layer: int, x: Tensor) -> Tensor:
        """Return [n, intermediate]: silu(gate) · up of the normalised x, deltas added to both."""
        ...

    def mlp_out(self, plan: PlanT, layer: int, h: Tensor, x: Tensor) -> Tensor:
        """Return x + h projected, deltas added."""
        ...

    def forward(self, plan: PlanT) -> Tensor:
        """Return x after the last layer: ``embed`` and the five ops of each layer, or one native call for them all."""
        ...

    def hidden(self, plan: PlanT, x: Tensor, rows: Ints) -> Tensor:
        """Return the last hidden states of the tokens at ``rows`` ([k]), normalised: [m, hidden], m ≥ k."""
        ...

    def logits(self, plan: PlanT, hidden: Tensor, count: int) -> Tensor:
        """Return the base's logits of the first ``count`` of ``hidden``: float32 [count, vocab]."""
        ...

    def answer(self, plan: PlanT, rows: Ints, hidden: Tensor, logits: Tensor) -> Mapping[int, Tensor]:
        """Give the tokens at ``rows`` whose adapters change the head what these say, from ``logits``' on.

        ``hidden`` and ``logits`` are those of ``rows``. Changed in place where there are as many ids as the base's; the
        others' are returned: float32 [ids] by place in ``rows``.
        """
        ...

    @property
    def sampling(self) -> NativeSampling | None:
        """How it samples; None: it leaves that to the engine, which does it in torch."""
        ...

    def launch(self, plan: PlanT, rows: Ints, columns: SamplingColumns | None) -> Any:
        """Begin the step and don't wait: layers, logits of the tokens at ``rows`` [n], and with ``columns`` a token
        of some of these. A backend whose ``sampling`` is None is given none. The batch's ``state_rows`` are told as
        ``hidden`` tells them. Returns what ``collect`` takes.

        A second step may be launched once the first has been collected.
        """
        ...

    @property
    def wakes(self) -> bool:
        """Whether ``collect`` wakes somebody."""
        ...

    def collect(self, launched: Any, wake: int = -1) -> StepOutput:
        """Wait for a step that was launched; raises what went wrong in it.

        ``wake``, if it isn't negative, is a file descriptor that a backend which ``wakes`` writes a byte to once it
        has given the interpreter's lock up: whoever waits for that byte has the interpreter to itself.

        What it returns lasts until the next step of the same model is launched.
        """
        ...

    def finite(self, plan: PlanT, x: Tensor) -> Tensor:
        """Say of each token whether its state in x, and its keys and values in every layer, are finite: bool [T]."""
        ...


AnyBackend: TypeAlias = Backend[Any, Any]
"""A backend, whatever its plans are."""


def compose(backend: Backend[Any, PlanT], plan: PlanT, num_layers: int) -> Tensor:
    """Return what ``forward`` must: the ops one after the other."""
    x = backend.embed(plan)
    for layer in range(num_layers):
        o = backend.attend(plan, layer, backend.attn_in(plan, layer, x))
        x = backend.attn_out(plan, layer, o, x)
        x = backend.mlp_out(plan, layer, backend.mlp_in(plan, layer, x), x)
    return x
