"""vLLM's routes for adapters, with the bodies that routers send and the words that they look for."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from tests.server.api.running import BASE, Files, Running

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(autouse=True)
def _leave_the_shared_adapters(server: Running, http: httpx.Client) -> Iterator[None]:
    yield
    http.delete("/adapters/new?abort=true")


def load(http: httpx.Client, path: str = "b", **more: object) -> httpx.Response:
    return http.post(LOAD, json={"lora_name": "new", "lora_path": path, **more})


def answer(http: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": "hello", "max_tokens": 12, "temperature": 0}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def message(response: httpx.Response) -> str:
    text: str = response.json()["error"]["message"]
    return text


def test_an_adapter_is_loaded_replaced_and_unloaded(http: httpx.Client) -> None:
    made = load(http)
    assert (made.status_code, made.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert answer(http, "new") == answer(http, "b")
    swapped = load(http, "c", load_inplace=True)
    assert swapped.status_code == 200
    assert answer(http, "new") == answer(http, "c")
    gone = http.post(UNLOAD, json={"lora_name": "new"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'new' removed successfully.")


def test_a_taken_and_an_unknown_name_are_told_in_the_words_that_clients_look_for(http: httpx.Client) -> None:
    load(http).raise_for_status()
    for path in ("b", "c"):
        taken = load(http, path)
        assert taken.status_code == 400
        assert "has already been loaded" in message(taken)
        assert "load_inplace" in message(taken)
        assert taken.json()["error"]["param"] == "lora_name"
    unknown = http.post(UNLOAD, json={"lora_name": "nobody"})
    assert unknown.status_code == 404
    assert "cannot be found" in message(unknown)
    assert "new" in message(unknown)
    assert unknown.json()["error"]["code"] == "model_not_found"


def test_a_path_that_is_not_there_is_404(http: httpx.Client) -> None:
    for inplace in (False, True):
        assert load(http, "nowhere", load_inplace=inplace).status_code == 404
    assert http.post(LOAD, json={"lora_name": "x"}).json()["error"]["param"] == "lora_path"


def test_the_whole_request_of_vllm_and_of_the_gateways_sidecar_pass(
    http: httpx.Client, server: Running
) -> None:
    source = server.server.deps.settings.base_source
    assert source.endswith("/base")
    for base_model in ("", BASE, source):
        assert load(http, load_inplace=True, base_model_name=base_model).status_code == 200
    assert load(http, load_inplace=True, is_3d_lora_weight=False, base_model_name=None).status_code == 200
    other = load(http, load_inplace=True, base_model_name="meta-llama/Llama-3.1-8B")
    assert (other.status_code, other.json()["error"]["param"]) == (400, "base_model_name")
    assert BASE in message(other)
    assert load(http, load_inplace=True, is_3d_lora_weight=True).status_code == 400
    assert http.post(UNLOAD, json={"lora_name": "new", "lora_int_id": 7}).status_code == 200


def test_the_root_of_an_adapter_is_the_path_it_was_loaded_from(http: httpx.Client) -> None:
    load(http).raise_for_status()
    shown = http.get("/v1/models/new").json()
    assert (shown["root"], shown["parent"]) == ("b", BASE)
    load(http, "c", load_inplace=True).raise_for_status()
    listed = {each["id"]: each["root"] for each in http.get("/v1/models").json()["data"]}
    assert listed["new"] == "c"
    assert listed[BASE] == BASE


def test_twenty_loads_in_place_of_one_free_name_all_succeed(server: Running) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: load(http, "bc"[n % 2], load_inplace=True), range(20)))
        assert [each.status_code for each in answers] == [200] * 20, [each.text for each in answers]
        assert answer(http, "new") in (answer(http, "b"), answer(http, "c"))


def test_loads_in_place_between_unloads_all_succeed(server: Running) -> None:
    def change(number: int) -> tuple[str, httpx.Response]:
        if number % 3 == 2:
            return "unload", http.post(UNLOAD, json={"lora_name": "new"})
        return "load", load(http, "bc"[number % 2], load_inplace=True)

    with httpx.Client(base_url=server.url, timeout=60) as http, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(change, range(30)))
        assert [each.text for kind, each in answers if kind == "load" and each.status_code != 200] == []
        # An unload may come before any load, or after another unload.
        assert {each.status_code for kind, each in answers if kind == "unload"} <= {200, 404}
        load(http, "b", load_inplace=True).raise_for_status()
        assert answer(http, "new") == answer(http, "b")


def test_an_adapter_that_never_fits_is_400_which_no_router_repeats(files: Files, http: httpx.Client) -> None:
    directory = write_adapter(files.adapters / "wide", files.base, AdapterShape(rank=129, seed=9))
    try:
        for inplace in (False, True):
            refused = load(http, "wide", load_inplace=inplace)
            assert refused.status_code == 400
            assert "--arena-rows" in message(refused)
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
