"""Launch configurations: a pure function of what a launch looks like, from files that tuning writes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton.kernels import autotune, launch, tuning

ROOT = Path(__file__).parents[1]
KEY = tuning.Key("forward_kernel", 16, "nchw", 256, 8, 18)
SLOW, FAST = tuning.Config(32, 64, 128, 2), tuning.Config(64, 32, 128, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the user's configurations."""
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "configs"))
    tuning.forget()
    return tmp_path / "configs"


@pytest.fixture(autouse=True)
def fresh() -> None:
    yield
    tuning.forget()


def test_defaults_where_nothing_was_measured(folder: Path) -> None:
    assert tuning.choose(KEY, "NVIDIA H200") == tuning.default(KEY)
    assert not folder.exists()


def test_the_nearest_measured_configuration(folder: Path) -> None:
    large = KEY._replace(log2_pixels=22)
    path = tuning.write("NVIDIA H200", {KEY: SLOW, large: FAST}, {"by": "test"})
    assert path == folder / "NVIDIA_H200.json"
    assert json.loads(path.read_text())["about"] == {"by": "test"}
    for pixels, expected in ((1, SLOW), (18, SLOW), (19, SLOW), (21, FAST), (22, FAST), (30, FAST)):
        assert tuning.choose(KEY._replace(log2_pixels=pixels), "NVIDIA H200") == expected
    assert tuning.choose(KEY._replace(channels=512), "NVIDIA H200") == SLOW
    for other in (
        KEY._replace(kernel="mask_kernel"),
        KEY._replace(bits=32),
        KEY._replace(layout="nhwc"),
        KEY._replace(tokens=16),
    ):
        assert tuning.choose(other, "NVIDIA H200") == tuning.default(other)
    assert tuning.choose(KEY, "NVIDIA A100-SXM4-80GB") == tuning.default(KEY)


def test_the_users_file_comes_before_the_shipped_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = folder / "shipped.json"
    tuning.write("gpu", {KEY: SLOW}, {})
    tuning.user_file("gpu").rename(shipped)
    monkeypatch.setattr(tuning, "shipped_file", lambda gpu: shipped)
    tuning.forget()
    assert tuning.choose(KEY, "gpu") == SLOW
    tuning.write("gpu", {KEY: FAST}, {})
    assert tuning.choose(KEY, "gpu") == FAST


def test_a_broken_file_is_named(folder: Path) -> None:
    folder.mkdir()
    tuning.user_file("gpu").write_text('{"configs": [{"key": 1}]}')
    with pytest.raises(ValueError, match=r"gpu\.json: expected what `python -m maskd_triton.kernels.autotune` writes"):
        tuning.choose(KEY, "gpu")


@pytest.mark.parametrize("kernel", [*tuning.READING, *tuning.WRITING])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("bits", [16, 32])
def test_candidates_hold_to_what_makes_them_fast(kernel: str, layout: str, bits: int) -> None:
    key = tuning.Key(kernel, bits, layout, 256, 8, 18)
    found = autotune.candidates(key)
    assert found[0] == tuning.default(key)
    assert 8 <= len(found) == len(set(found)) <= 60
    for config in found[1:]:
        assert 8 <= config.block_c * config.block_p / config.threads <= 32
        assert (config.block_p if layout == "nchw" else config.block_c) * bits >= 8 * 128


def favourite(wanted: tuning.Config, kernel: str, seen: list[tuning.Config]) -> autotune.Clock:
    """A clock for which ``wanted`` is the fastest; it runs nothing but the first candidate."""

    def clock(call: Callable[[], object]) -> float:
        config = tuning.config(KEY._replace(kernel=kernel), torch.device("cpu"))
        if not seen:
            call()
        seen.append(config)
        return 1.0 if config == wanted else 2.0

    return clock


@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU the clock is real")
@pytest.mark.parametrize("kernel", [*tuning.READING, *tuning.WRITING])
def test_tuning_writes_what_the_library_then_uses(kernel: str) -> None:
    key = tuning.Key(kernel, 32, "nchw", 16, 8, 6)
    wanted, seen = autotune.candidates(key)[3], []
    assert autotune.tune([key], torch.device("cpu"), clock=favourite(wanted, kernel, seen)) == {key: wanted}
    assert seen == autotune.candidates(key)
    assert tuning.config(key, torch.device("cpu")) == wanted


def test_online_tuning_is_opt_in_and_bucketed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that writes what it found is asked once for a kernel and a bucket of pixels."""
    searched: list[tuning.Key] = []

    def search(key: tuning.Key, device: torch.device) -> None:
        searched.append(key)
        tuning.write(tuning.gpu_name(device), {key: tuning.default(key)}, {})

    device = "cpu" if launch.INTERPRETED else "cuda"
    criterion = MaskedDistillLoss(4, 2, pretrained=MaskLearner(4, 2), impl="triton").to(device)

    def step(height: int, width: int) -> None:
        x = torch.randn(1, 4, height, width, device=device, requires_grad=True)
        criterion(x, x.detach()).backward()

    step(3, 3)
    assert not searched
    monkeypatch.setattr(tuning, "search", search)
    for height, width in ((3, 3), (4, 4), (3, 5), (2, 7)):  # 9 to 16 pixels: one bucket; 3x3 has a plan from before
        step(height, width)
    assert [key.kernel for key in searched] == ["forward_kernel", "backward_kernel"]
    step(5, 5)
    assert [key.log2_pixels for key in searched] == [4, 4, 5, 5]
    with tuning.forced("forward_kernel", FAST):
        step(9, 9)
    assert [key.log2_pixels for key in searched] == [4, 4, 5, 5]


@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU the clock is real")
def test_a_search_starts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass that a backward kernel needs is no launch of the user's."""
    monkeypatch.setattr(tuning, "search", lambda key, device: pytest.fail(f"searched for {key}"))
    key = tuning.Key("backward_kernel", 32, "nchw", 4, 8, 4)
    assert list(autotune.tune([key], torch.device("cpu"), clock=lambda call: 1.0)) == [key]


@pytest.mark.slow
@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU the clock is real")
@pytest.mark.parametrize("asked", ["", "0", "1"])
def test_the_environment_asks_for_online_tuning(asked: str, folder: Path, tmp_path: Path) -> None:
    """Read when the first kernel is loaded; where nobody asks, the search is not even imported."""
    environment = dict(os.environ, MASKD_TRITON_AUTOTUNE=asked, PYTHONPATH=str(ROOT))
    command = [sys.executable, str(ROOT / "tests" / "programs" / "online.py")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    kernels = ["forward_kernel", "backward_kernel", "mask_kernel", "gate_kernel", "token_gradient_kernel"]
    assert sorted(run.stdout.split()) == (sorted(kernels) if asked == "1" else [])
    assert folder.exists() == (asked == "1")


def test_a_plan_lasts_until_configurations_change(monkeypatch: pytest.MonkeyPatch) -> None:
    configs, (x,) = [], [torch.randn(1, 4, 3, 5)]
    criterion = MaskedDistillLoss(4, 2, pretrained=MaskLearner(4, 2), impl="triton").eval()
    config = tuning.config
    monkeypatch.setattr(tuning, "config", lambda *arguments: configs.append(config(*arguments)) or configs[-1])
    for _ in range(3):
        criterion(x, x)
    assert len(configs) == 1
    wanted = tuning.Config(32, 32, 128, 1)
    with tuning.forced("forward_kernel", wanted):
        criterion(x, x)
    assert configs[1:] == [wanted]
    criterion(x, x)
    assert configs[2:] == configs[:1]


def test_environment_variables_are_documented() -> None:
    sources = [path for folder in ("maskd_triton", "kernels") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"MASKD_TRITON_\w+", path.read_text())}
    page = (ROOT / "docs/environment.md").read_text()
    assert read == set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))


@pytest.mark.slow
def test_the_command_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run([sys.executable, "-m", "maskd_triton.kernels.autotune"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "")
    assert "torch sees no GPU here" in run.stdout


def test_the_command_on_a_gpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """All but the search itself, which a GPU is needed for."""

    def tune(keys: list[tuning.Key], device: torch.device, by: str, say: Callable[[str], None]) -> None:
        assert device == torch.device("cuda", 0)
        for key in keys:
            say(key.kernel)
        tuning.write("gpu", {key: FAST for key in keys}, {"by": by})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "gpu")
    monkeypatch.setattr(autotune, "tune", tune)
    out = tmp_path / "copy.json"
    arguments = ["--kernel", "gate_kernel", "--bits", "32", "--layout", "nhwc", "--tokens", "9", "--out", str(out)]
    assert autotune.main(arguments) == 0
    assert tuning.read(out) == {tuning.Key("gate_kernel", 32, "nhwc", 256, 16, pixels): FAST for pixels in (18, 21)}
    assert json.loads(out.read_text())["about"] == {"by": " ".join(["python -m maskd_triton.kernels.autotune", *arguments])}
    assert capsys.readouterr().out.splitlines() == ["gate_kernel", "gate_kernel", f"written to {folder / 'gpu.json'}"]
