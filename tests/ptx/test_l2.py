"""The model of the L2 cache: its trace is what compiled kernels do in the emulator, and the cache is right by hand."""

import json
import warnings
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bench import l2
from bench.l2 import Cache, Hint, Model, Site, Tiles, Trace, Variant
from bench.workloads import DTYPES, Workload
from maskd_triton import MaskedDistillLoss, MaskLearner
from tests.ptx.driver import virtual_gpu
from tests.ptx.record import Record

RESULTS = Path(__file__).parents[2] / "bench/results/l2.json"
ODD = Workload("odd", ((136, 13, 21), (136, 7, 10)), batch=2, dtype="bf16")  # a last block of 8 channels in both layouts
EVEN = Workload("even", ((256, 16, 32), (256, 8, 16)), batch=4, dtype="bf16")
POINTERS = {"student": "s_ptrs", "teacher": "t_ptrs", "masks": "mask_ptrs", "gradient": "g_ptrs"}
LEFT_OUT = {
    *("token_ptrs", "raw_token_ptrs", "raw_bias_ptrs", "pool_ptrs", "affine_ptrs"),
    *("step_ptr", "part_ptr", "coefficient_ptr", "up_ptr"),
}
Touched = dict[tuple[int, str, bool], np.ndarray]
"""By program, tensor with its level, and whether it is written: which of the tensor's bytes."""


@triton.jit
def _second_half(x_ptr, y_ptr, P: tl.constexpr):
    p = tl.program_id(0) * P + P // 2 + tl.arange(0, P // 2)
    tl.store(y_ptr + p, tl.load(x_ptr + p))


def test_every_program_s_bytes_are_recorded() -> None:
    x, y = torch.ones(256), torch.empty(256)
    with virtual_gpu(90) as gpu:
        with gpu.recording() as found:
            _second_half[(2,)](x, y, 128, num_warps=1)
        _second_half[(2,)](x, y, 128, num_warps=1)
    (record,) = found
    assert record.kernel == "test_l2._second_half"
    assert record.read.keys() == {(0, "x_ptr"), (1, "x_ptr")}
    assert record.written.keys() == {(0, "y_ptr"), (1, "y_ptr")}
    for (program, _), touched in (*record.read.items(), *record.written.items()):
        assert np.flatnonzero(touched).tolist() == [*range(512 * program + 256, 512 * program + 512)]


def recorded(record: Record) -> Touched:
    """What programs touched of features, masks and gradient, and that all else is known to be left out."""
    names = {pointer: tensor for tensor, pointer in POINTERS.items()}
    found: Touched = {}
    for write, accesses in ((False, record.read), (True, record.written)):
        for (program, name), touched in accesses.items():
            # an allocation also has the names of arguments that it stands in for
            own = {names[x[:-3]] + x[-3:] for x in name.split("|") if x[:-3] in names}
            if own:
                (tensor,) = own
                found[program, tensor, write] = touched
            else:
                assert {x.partition("[")[0] for x in name.split("|")} <= LEFT_OUT
    return found


def generated(workload: Workload, programs: list[list[l2.Access]]) -> Touched:
    """The same of what the model says."""
    found: Touched = {}
    for program, accesses in enumerate(programs):
        for access in accesses:
            c, h, w = workload.levels[access.level]
            masks = access.tensor == "masks"
            itemsize, channels = (4, workload.tokens) if masks else (DTYPES[workload.dtype].itemsize, c)
            elements = np.zeros((workload.batch, channels, h * w), bool)
            elements[access.image, access.channels.start : access.channels.stop, np.array(access.pixels)[:, None]] = True
            if workload.layout == "channels_last" and not masks:
                elements = elements.swapaxes(1, 2)
            found[program, f"{access.tensor}[{access.level}]", access.write] = np.repeat(elements.ravel(), itemsize)
    return found


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_programs_are_those_of_the_kernels(layout: str) -> None:
    """Byte by byte, for every program and tensor of both kernels."""
    workload = replace(ODD, layout=layout)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    shapes = [(workload.batch, *level) for level in workload.levels]
    student, teacher = ([torch.randn(x).to(torch.bfloat16, memory_format=memory) for x in shapes] for _ in range(2))
    channels = [c for c, _, _ in workload.levels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tokens that have not learned
        criterion = MaskedDistillLoss(channels, pretrained=MaskLearner(channels, workload.tokens), impl="triton")
    with virtual_gpu(90) as gpu, gpu.recording() as records:
        torch.autograd.grad(criterion([x.requires_grad_() for x in student], teacher), student)
    of_kernel = {record.kernel: record for record in records}
    for kernel, generate in (("forward_kernel", l2.forward_programs), ("backward_kernel", l2.backward_programs)):
        programs = [
            program
            for level in range(len(workload.levels))
            for image in range(workload.batch)
            for program in generate(workload, Tiles.of(workload), level, image)
        ]
        expected, found = generated(workload, programs), recorded(of_kernel[f"distill.{kernel}"])
        assert expected.keys() == found.keys()
        for key, touched in expected.items():
            assert np.array_equal(touched, found[key]), (kernel, key)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_both_kernels_take_whole_chunks(layout: str) -> None:
    trace, part = Trace(replace(ODD, layout=layout)), [(level, image) for level in range(2) for image in range(2)]
    sizes, moved = defaultdict(set), defaultdict(int)
    for program in (*trace.forward(part), *trace.backward(part)):
        for site, chunk, size in program:
            moved[Site(site)] += size
            if site != Site.BORDER:
                sizes[chunk].add(size)
    assert all(len(each) == 1 for each in sizes.values())
    feature, masks = trace.workload.feature_bytes, 4 * 6 * 2 * (13 * 21 + 7 * 10)
    assert sum(size for (size,) in sizes.values()) == 3 * feature + masks
    assert moved[Site.FORWARD_FEATURES] == moved[Site.BACKWARD_FEATURES] == 2 * feature
    assert moved[Site.GRADIENT] == feature
    assert moved[Site.FORWARD_MASKS] == masks
    assert moved[Site.BACKWARD_MASKS] == masks * (5 if layout == "nchw" else 2)  # for every block of channels
    # rows, columns and corners of both levels and images; columns and corners of nchw by sectors
    along, apart = 2 * (21 + 10), 2 * (13 + 7) + 8
    assert moved[Site.BORDER] == 2 * 136 * (along * 2 + apart * (32 if layout == "nchw" else 2))


def test_least_recently_used_goes_first() -> None:
    cache = Cache(30)
    for chunk in (1, 2, 3, 1, 4):  # 4 takes the place of 2
        cache.load(chunk, 10)
    assert cache.read == 40
    cache.load(1, 10)
    cache.load(3, 10)
    assert cache.read == 40
    cache.load(2, 10)
    assert (cache.read, cache.written) == (50, 0)


def test_writes_fetch_nothing_and_reach_memory_once() -> None:
    cache = Cache(20)
    cache.store(1, 10)
    cache.store(1, 10)
    cache.load(1, 10)
    cache.load(2, 10)
    assert (cache.read, cache.written) == (10, 0)
    cache.load(3, 10)  # evicts 1
    assert (cache.read, cache.written) == (20, 10)
    cache.load(2, 10)
    cache.load(1, 10)  # evicts 3, is clean
    cache.store(2, 10)
    cache.flush()
    cache.flush()
    assert (cache.read, cache.written) == (30, 20)


def test_hints_say_what_goes() -> None:
    cache = Cache(30)
    cache.load(1, 10, Hint.LAST)
    cache.load(2, 10)
    cache.load(3, 10, Hint.FIRST)
    cache.load(4, 10)  # evicts 3
    cache.load(5, 10)  # evicts 2
    cache.load(6, 10)  # evicts 4
    cache.load(1, 10)  # is held; the last access counts, so it is like others now
    assert cache.read == 60
    cache.load(5, 10, Hint.FIRST)
    cache.load(7, 10)  # evicts 5
    cache.load(6, 10)
    cache.load(1, 10)
    assert cache.read == 70
    for chunk in (8, 9, 10, 11):
        cache.store(chunk, 10, Hint.LAST)  # where all go last, the oldest does
    assert (cache.read, cache.written) == (70, 10)
    cache.load(9, 10)
    assert cache.read == 70


def test_other_work_passes_what_is_to_go_last() -> None:
    cache = Cache(4 * l2.OTHER)
    cache.load(1, l2.OTHER, Hint.LAST)
    cache.store(2, l2.OTHER)
    cache.load(3, l2.OTHER)
    cache.stream(2 * l2.OTHER)  # evicts 2
    assert (cache.read, cache.written) == (2 * l2.OTHER, l2.OTHER)
    cache.load(3, l2.OTHER)
    assert cache.read == 2 * l2.OTHER
    cache.stream(100 * l2.OTHER)
    cache.load(1, l2.OTHER)
    assert cache.read == 2 * l2.OTHER
    cache.load(3, l2.OTHER)
    assert cache.read == 3 * l2.OTHER


def test_a_peek_moves_nothing() -> None:
    cache = Cache(20)
    cache.load(1, 10)
    cache.load(2, 10)
    cache.peek(1, 4)
    assert cache.read == 20
    cache.peek(3, 4)
    assert cache.read == 24
    cache.load(4, 10)  # evicts 1, which was only looked at
    cache.load(2, 10)
    assert cache.read == 34


def test_a_copy_goes_its_own_way() -> None:
    cache = Cache(20)
    cache.store(1, 10)
    other = cache.copy()
    other.load(2, 10)
    other.load(3, 10)
    assert (other.read, other.written, other.used) == (20, 10, 20)
    cache.load(1, 10)
    cache.flush()
    assert (cache.read, cache.written, cache.used) == (0, 10, 10)


def units(moved: Cache, workload: Workload) -> tuple[float, float]:
    """Read and written bytes in units of one feature tensor."""
    return moved.read / workload.feature_bytes, moved.written / workload.feature_bytes


MASKS = 4 * 6 / (256 * 2)  # of a unit of EVEN


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_without_a_cache_and_with_room_for_all(layout: str) -> None:
    workload = replace(EVEN, layout=layout)
    trace = Trace(workload)
    border = sum(
        size
        for image in range(4)
        for level in range(2)
        for p in trace.forward([(level, image)])
        for site, _, size in p
        if site == 2
    )
    read, written = units(Model(trace, 0).step(l2.ONE_PASS[0], 0), workload)
    blocks = 8 if layout == "nchw" else 2  # of channels, each of which reads the masks
    assert read == pytest.approx(4 + blocks * MASKS + border / workload.feature_bytes)
    assert written == pytest.approx(1 + MASKS)
    room = Model(trace, 10 * workload.feature_bytes)
    for variant in l2.VARIANTS:
        assert units(room.step(variant, 0), workload) == pytest.approx((2, 1 + MASKS)), variant.name


def test_what_is_held_between_the_passes_is_not_read_again() -> None:
    """Hints make use of all of the cache; without them, gradients take a third of it, and plain order makes use of nothing."""
    trace, capacity = Trace(EVEN), EVEN.feature_bytes // 2
    plain, reverse, hints, both, keep = (units(Model(trace, capacity).step(variant, 0), EVEN)[0] for variant in l2.ONE_PASS)
    assert plain == pytest.approx(4 + MASKS, abs=0.1)
    assert plain - hints == pytest.approx(0.5, abs=0.1)
    assert plain - both == pytest.approx(0.5, abs=0.1)
    assert 0.2 < plain - reverse < 0.4
    assert keep == pytest.approx(hints, abs=0.05)


def test_other_work_leaves_what_is_kept() -> None:
    trace, capacity = Trace(EVEN), EVEN.feature_bytes // 2
    plain, reverse, hints, both, keep = (units(Model(trace, capacity).step(x, capacity), EVEN)[0] for x in l2.ONE_PASS)
    assert plain == pytest.approx(reverse, abs=0.02)
    assert plain == pytest.approx(hints, abs=0.02)
    assert plain == pytest.approx(both, abs=0.02)
    assert plain - keep == pytest.approx(0.75 * 0.5, abs=0.1)


FPN = replace(l2.WORKLOADS["fpn"], dtype="bf16")


def totals(trace: Trace, *variants: Variant) -> list[float]:
    """DRAM traffic with the smaller cache and no other work."""
    model = Model(trace, l2.CACHES[0])
    return [sum(units(model.step(variant, 0), FPN)) for variant in variants]


def test_which_hints_matter() -> None:
    """In plain order those of loads and of stores together; in reverse either; the masks, read for every block, none."""
    features, gradient = ((site,) for site in l2.STREAM)
    plain, first, second, both, masks = totals(
        Trace(FPN),
        *(Variant("", evict_first=x) for x in ((), features, gradient, l2.STREAM, (*l2.STREAM, Site.BACKWARD_MASKS))),
    )
    assert plain == pytest.approx(first, abs=0.01)
    assert plain == pytest.approx(second, abs=0.01)
    assert plain - both > 0.5
    assert masks - both > 0.2
    first, second, both = totals(
        Trace(FPN), *(Variant("", reverse=True, evict_first=x) for x in (features, gradient, l2.STREAM))
    )
    assert both <= first < both + 0.02
    assert both <= second < both + 0.06


class Waves(Trace):
    """Programs of a wave take turns at their touches: 2 of forward, 8 of backward on each of 132 multiprocessors."""

    def forward(self, part: l2.Part) -> l2.Programs:
        return self._interleaved(super().forward(part), 2 * 132)

    def backward(self, part: l2.Part) -> l2.Programs:
        return self._interleaved(super().backward(part), 8 * 132)

    def _interleaved(self, programs: l2.Programs, wave: int) -> l2.Programs:
        starts = range(0, len(programs), wave)
        return [[x for x in turn if x] for i in starts for turn in zip_longest(*programs[i : i + wave])]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_waves_change_little(layout: str) -> None:
    workload = replace(FPN, layout=layout)
    waves, order = Waves(workload), Trace(workload)
    for variant in (*l2.ONE_PASS[:-1], *l2.WITH_LOSS):
        for capacity in l2.CACHES:
            (a, b), (c, d) = (units(Model(trace, capacity).step(variant, 0), FPN) for trace in (waves, order))
            assert a + b == pytest.approx(c + d, abs=0.06 if variant.evict_first else 0.35), (variant.name, capacity)


def test_parts() -> None:
    """Student, teacher and gradient of an image take 786432 bytes of the first level and 196608 of the second."""
    plain, with_loss = Variant(""), Variant("", with_loss=True)
    whole = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert l2.parts(EVEN, plain, 0) == [whole]
    assert l2.parts(EVEN, with_loss, 2 * 4 * (786432 + 196608)) == [whole]
    assert l2.parts(EVEN, with_loss, 2 * 2 * 786432) == [whole[:2], whole[2:4], whole[4:]]
    assert l2.parts(EVEN, with_loss, 0) == [[at] for at in whole]


def test_a_finished_gradient_is_rescaled_in_one_more_pass() -> None:
    trace, capacity = Trace(EVEN), EVEN.feature_bytes // 2
    once, twice = (
        units(Model(trace, capacity).step(replace(l2.WITH_LOSS[0], rescale=x), 100 * capacity), EVEN) for x in (False, True)
    )
    assert np.subtract(twice, once) == pytest.approx((1, 1))


def test_results_are_the_model_s() -> None:
    chosen = [x for x in l2.VARIANTS if x.name in ("reverse, hints", "with loss, hints, rescaled")]
    known = [
        x for x in json.loads(RESULTS.read_text())["rows"] if x["images"] == 2 and x["variant"] in {y.name for y in chosen}
    ]
    assert [asdict(row) for row in l2.rows((2,), chosen)] == known
    assert len(known) == 2 * 2 * 2 * 3
