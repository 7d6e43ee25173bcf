"""The count of launches has a line for each step, and names no line that waits for the device: there is none."""

import subprocess
import sys


def test_a_step_of_fixed_shapes_asks_for_less_than_a_prompt_and_waits_nowhere() -> None:
    words = [
        sys.executable,
        "-m",
        "manylora.loadtest.lab.launches",
        "--model",
        "tiny",
        "--quantization",
        "nf4",
    ]
    sizes = ["--rows", "3", "--adapters", "2", "--rank", "4", "--context", "70"]
    done = subprocess.run([*words, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "waits" not in done.stdout
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert lines["step"][2:] == [
        *("begin_step", "embed", "attn_in", "attend", "attn_out", "mlp_in", "mlp_out", "hidden", "logits"),
        *("finite", "other"),
    ]
    assert 20 < float(lines["decode"][0]) < float(lines["prefill"][0])
    assert int(lines["decode"][3]) > 0
