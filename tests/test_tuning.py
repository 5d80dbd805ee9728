"""Launch configurations: a pure function of what a launch looks like, from files that tuning writes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
    assert tuning.choose(KEY, "NVIDIA H200") == tuning.default(KEY) == tuning.Config(16, 128, 128, 3)
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
    with pytest.raises(ValueError, match=r"gpu\.json: expected what `python -m bench.autotune` writes"):
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
        config = tuning._forced[kernel]
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
    assert tuning.config(kernel, [torch.empty(2, 16, 32)], 32, 0, 6) == wanted


@pytest.mark.skipif(not launch.INTERPRETED, reason="on a GPU the clock is real")
def test_online_tuning_is_opt_in_and_bucketed(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[tuning.Key] = []

    def tune(keys: list[tuning.Key], device: torch.device) -> None:
        tuned.extend(keys)
        tuning.write("cpu", {key: tuning.default(key) for key in keys}, {})

    monkeypatch.setattr(autotune, "tune", tune)
    criterion = MaskedDistillLoss(4, 2, pretrained=MaskedDistillLoss(4, 2, weight_mask=False).state_dict(), weight_mask=False)
    criterion.impl = "triton"

    def step(height: int, width: int) -> None:
        x = torch.randn(1, 4, height, width, requires_grad=True)
        criterion(x, torch.randn(1, 4, height, width)).backward()

    step(3, 3)
    assert not tuned
    monkeypatch.setenv(tuning.ONLINE, "1")
    tuning.forget()
    for height, width in ((3, 3), (4, 4), (3, 5), (2, 7)):  # 9 to 16 pixels: one bucket
        step(height, width)
    assert [key.kernel for key in tuned] == ["forward_kernel", "backward_kernel"]
    step(5, 5)
    assert [key.log2_pixels for key in tuned] == [4, 4, 5, 5]


def test_a_plan_lasts_until_configurations_change(monkeypatch: pytest.MonkeyPatch) -> None:
    configs, (x,) = [], [torch.randn(1, 4, 3, 5)]
    criterion = MaskedDistillLoss(4, 2, pretrained=MaskLearner(4, 2), impl="triton")
    config = tuning.config
    monkeypatch.setattr(tuning, "config", lambda *arguments: configs.append(config(*arguments)) or configs[-1])
    for _ in range(3):
        criterion(x, x)
    assert len(configs) == 1
    wanted = tuning.Config(32, 32, 128, 1)
    with tuning.forced("forward_kernel", wanted):
        criterion(x, x)
    assert configs[1:] == [wanted]
    tuning.forget()
    criterion(x, x)
    assert configs[2:] == configs[:1]


def test_the_command_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run([sys.executable, "-m", "bench.autotune"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "")
    assert "torch sees no GPU here" in run.stdout
