"""Files of tokens that are damaged or meant to harm: a sentence, or loaded whole; nothing is executed, nothing half loaded."""

import os
import pickle
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton.checkpoints import load_masks, mask_state

CHANNELS, TOKENS = [4, 6], 3
FORMS = ["zip", "legacy", "safetensors"]


def learned(seed: int) -> MaskLearner:
    torch.manual_seed(seed)
    return MaskLearner(CHANNELS, TOKENS)


def written(state: Any, folder: Path, form: str = "zip") -> Path:
    """A file of ``state`` in one of FORMS."""
    if form == "safetensors":
        path = folder / "tokens.safetensors"
        pytest.importorskip("safetensors.torch", reason="needs the safetensors extra").save_file(state, path)
    else:
        path = folder / f"{form}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path


def loaded(module: nn.ModuleList | nn.ModuleDict, path: Path) -> ValueError | None:
    """The error, and the module as it was; or None, and a module that holds what the file does. Nothing else may happen."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    try:
        load_masks(module, path)
    except ValueError as error:
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        return error
    found = mask_state(path)
    for key, value in module.state_dict().items():
        assert torch.equal(value, found[f"mask_modules.{key}"].to(value.dtype)), key
        assert value.isfinite().all()
    return None


# --- mutated files ----------------------------------------------------------------------------------------------------

MUTATIONS = int(os.environ.get("MASKD_FUZZ_FILES", "150"))  # of every form


def mutations(draw: Any, content: bytes) -> bytes:
    """One to three changes of a file: bits, bytes, pieces lost, doubled, moved or put in, an end cut off."""
    from hypothesis import strategies as st

    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.sampled_from((1, 2, 4, 8, 64, 700)))
        kind = draw(st.sampled_from(("bit", "byte", "lost", "doubled", "moved", "put in", "cut")))
        piece = bytes(data[at : at + size])
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "put in":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            if kind in ("lost", "moved"):
                del data[at : at + size]
            if kind in ("doubled", "moved"):
                to = draw(st.integers(0, len(data)))
                data[to:to] = piece
    return bytes(data)


@pytest.mark.parametrize("form", FORMS)
def test_mutated_files(form: str, tmp_path: Path) -> None:
    hypothesis = pytest.importorskip("hypothesis", reason="needs the test extra")
    path = written(learned(1).state_dict(), tmp_path, form)
    content, modules, outcomes = path.read_bytes(), learned(2).mask_modules, []

    @hypothesis.settings(max_examples=MUTATIONS, database=None, deadline=None, derandomize=True)
    @hypothesis.given(hypothesis.strategies.composite(mutations)(content))
    def run(damaged: bytes) -> None:
        path.write_bytes(damaged)
        error = loaded(modules, path)
        assert error is None or str(error).startswith("pretrained: "), error
        outcomes.append(error is None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of the pickle's protocol
        run()
    assert 0.3 * MUTATIONS < outcomes.count(False)


# --- files that are meant to harm -------------------------------------------------------------------------------------


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class State:
    """Unpickling it calls its ``__setstate__``."""

    marker = ""

    def __getstate__(self) -> str:
        return self.marker

    def __setstate__(self, marker: str) -> None:
        Path(marker).touch()


def harmful(marker: str) -> dict[str, Any]:
    """Objects that leave a file behind when they are unpickled."""
    state = State()
    state.marker = marker
    return {
        "system": Call(os.system, f"touch {marker}"),
        "popen": Call(subprocess.check_call, ["touch", marker]),
        "eval": Call(eval, f"open({marker!r}, 'w').close()"),
        "exec": Call(exec, f"open({marker!r}, 'w').close()"),
        "setstate": state,
        "import": Call(__import__, "antigravity"),
        "nested": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {marker}"))),
        "torch's own loader": Call(torch.load, marker),
    }


@pytest.mark.parametrize("name", ["system", "popen", "eval", "exec", "setstate", "nested"])
def test_the_harm_is_real(name: str, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(harmful(str(tmp_path / "marker"))[name]))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("place", ["whole", "key", "value", "in an entry's place"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", list(harmful("")))
def test_nothing_in_a_file_is_executed(name: str, form: str, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    trap = harmful(str(marker))[name]
    state: Any = {
        "whole": trap,
        "key": {**learned(1).state_dict(), (1, trap): 1},
        "value": {**learned(1).state_dict(), "epoch": trap},
        "in an entry's place": {**learned(1).state_dict(), "mask_modules.0.mask_token": trap},
    }[place]
    path = tmp_path / "tokens.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        path = written(state, tmp_path, form)
    error = loaded(learned(2).mask_modules, path)
    assert error is not None
    assert f"pretrained: {path} cannot be loaded safely (weights_only=True)" in str(error)
    assert not marker.exists()
    assert "antigravity" not in sys.modules


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
        error = loaded(learned(2).mask_modules, path)
    assert "cannot be loaded safely" in str(error)


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    """A length of 2**62 is not allocated."""
    path = written(learned(1).state_dict(), tmp_path, "safetensors")
    content = path.read_bytes()
    for length in (2**62, 2**63 - 1, 2**64 - 1, len(content) - 7):
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        assert "cannot be loaded safely" in str(loaded(learned(2).mask_modules, path))


# --- entries that do not fit ------------------------------------------------------------------------------------------

NAN = torch.full((TOKENS, 4), float("nan"))
WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "shape": ({"mask_modules.1.mask_token": torch.ones(TOKENS, 5)}, "misshapen: mask_modules.1.mask_token is [3, 5]"),
    "missing": ({"mask_modules.1.mask_token": None}, "missing: mask_modules.1.mask_token [3, 6]"),
    "nan": ({"mask_modules.0.mask_token": NAN}, "not finite: mask_modules.0.mask_token"),
    "one level more": ({"mask_modules.2.mask_token": torch.ones(TOKENS, 6)}, "unexpected: mask_modules.2.mask_token [3, 6]"),
    "dtype": ({"mask_modules.0.mask_token": torch.ones(TOKENS, 4).long()}, "wrong dtype: mask_modules.0.mask_token is torch."),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("entries", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_entries_in_a_file(entries: dict[str, Tensor | None], sentence: str, form: str, tmp_path: Path) -> None:
    state = {k: v for k, v in {**learned(1).state_dict(), **entries}.items() if v is not None}
    path = written(state, tmp_path, form)
    for module in (learned(2), MaskedDistillLoss(CHANNELS, TOKENS, pretrained=learned(2))):
        before = {k: v.clone() for k, v in module.state_dict().items()}
        with pytest.raises(ValueError, match="pretrained: the mask entries do not fit") as caught:
            load_masks(module.mask_modules, path)
        assert sentence in str(caught.value)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_places_that_hold_no_file(suffix: str, tmp_path: Path) -> None:
    learner, path = learned(1), tmp_path / f"tokens{suffix}"
    path.symlink_to(path.name)  # a loop
    with pytest.raises(FileNotFoundError, match=f"pretrained: no such file: {path}"):
        mask_state(path)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=f"pretrained: no such file: {path}"):
        mask_state(path)
    path.unlink()
    os.mkfifo(path)  # to open it would wait for a writer
    with pytest.raises(FileNotFoundError, match=f"pretrained: no such file: {path}"):
        mask_state(path)
    path.unlink()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"pretrained: {path} cannot be loaded safely"):
        mask_state(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"pretrained: expected a file, got the folder {path}"):
        mask_state(path)
    with pytest.raises(IsADirectoryError, match=f"save: expected a file, got the folder {path}"):
        learner.save(path)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files may have ``size`` bytes: like a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 100, 2000])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_disk_that_is_full_keeps_the_old_file(suffix: str, size: int, tmp_path: Path) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="needs the safetensors extra")
    path = tmp_path / f"tokens{suffix}"
    learned(1).save(path)
    before = path.read_bytes()
    with room_for(size), pytest.raises(OSError, match="File too large"):
        learned(2).save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 KiB of memory as a file system, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        sys.platform != "linux"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_small_file_system(small_disk: Path) -> None:
    path = small_disk / "tokens.pt"
    learned(1).save(path)
    before = path.read_bytes()
    (small_disk / "other").write_bytes(bytes(16384 - 8192))
    with pytest.raises(OSError, match="No space left on device"):
        learned(2).save(path)
    assert {p.name for p in small_disk.iterdir()} == {"tokens.pt", "other"}
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_at_any_time_leaves_a_whole_file(tmp_path: Path) -> None:
    program = str(Path(__file__).parent / "programs" / "saving.py")
    command = [sys.executable, program, str(tmp_path / "tokens.pt"), "100"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20  # died while they saved
