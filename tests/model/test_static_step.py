"""Steps in fixed shapes: what they leave alone, which shapes there are, and the same through compilers and graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from openelm.kernels.quantized import quantized_linear
from openelm.model import decoding
from openelm.model.config import ModelConfig
from openelm.model.decoding import Decoder
from openelm.model.quantized import Quantization, QuantizedMatrix, hold_quantized, rounded
from openelm.model.sizes import ModelChoice
from openelm.model.static_step import Shape, StaticStep
from openelm.model.transformer import OpenELM

from .conftest import MakeModel

CLOSE = {"atol": 2e-5, "rtol": 0.0}
"""Between logits of about 5."""
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "pack_model", lambda model: None)


def some_ids(*shape: int, seed: int = 4) -> Tensor:
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


def fill(decoder: Decoder, seed: int = 7) -> None:
    """Put numbers into every place of the cache, also where no slot holds any."""
    generator = torch.Generator().manual_seed(seed)
    for part in (*decoder._cache.keys, *decoder._cache.values):
        part.copy_(torch.randn(part.shape, generator=generator))


@pytest.mark.parametrize(
    ("slots", "positions", "shape"),
    [
        ([0], [0], Shape(1, 1, 256, False)),
        ([0], [255], Shape(1, 1, 256, False)),
        ([0], [256], Shape(1, 1, 512, False)),
        ([0], [511], Shape(1, 1, 512, False)),
        ([0], [512], Shape(1, 1, 700, False)),
        ([2, 0], [5, 300], Shape(4, 1, 512, False)),
        ([2], [5], Shape(1, 1, 256, True)),
        ([8, 9], [5, 6], Shape(2, 1, 256, True)),
        ([8, 9, 7, 6], [5, 6, 5, 5], Shape(10, 1, 256, False)),
        ([0, 0, 0, 1], [5, 6, 7, 9], Shape(2, 4, 256, False)),
        ([9, 9, 9, 9, 9], [254, 255, 256, 257, 258], Shape(1, 8, 512, True)),
    ],
    ids=str,
)
def test_few_shapes_serve_all_steps(
    odd_config: ModelConfig, slots: list[int], positions: list[int], shape: Shape
) -> None:
    decoder = Decoder(OpenELM(odd_config), 10, 700)
    found, table = decoder._static._laid_out(list(range(len(slots))), slots, positions)
    assert found == shape
    ids, places, where, writes, order = table.tolist()
    assert len(ids) == shape.rows * shape.tokens == len(set(zip(places, where, strict=True)))
    mine = [(ids[i], places[i], where[i], writes[i]) for i in order[: len(slots)]]
    assert mine == [
        (index, slot, position, 1) for index, (slot, position) in enumerate(zip(slots, positions, strict=True))
    ]
    assert sum(writes) == len(slots)


@pytest.mark.parametrize(
    "slots", [[0], [1, 0], [4], [3, 0, 2], [0, 0, 0], [4, 4, 4, 4, 1]], ids=["first", "two", "far", "three", "g", "gg"]
)
def test_all_but_the_places_of_the_tokens_stays_to_the_bit(make_model: MakeModel, slots: list[int]) -> None:
    decoder = Decoder(make_model(), 6, 9)
    fill(decoder)
    starts = {0: 0, 1: 2, 2: 8, 3: 1, 4: 5}  # several tokens of slot 4 end with the slot
    for slot, start in starts.items():
        decoder._rows[slot].used = start
    before = [part.clone() for part in (*decoder._cache.keys, *decoder._cache.values)]
    decoder.step([1] * len(slots), slots)
    for part, old in zip((*decoder._cache.keys, *decoder._cache.values), before, strict=True):
        changed = (part != old).any(dim=3).any(dim=1)
        expected = torch.zeros_like(changed)
        for slot in slots:
            expected[slot, starts[slot] : decoder.used(slot)] = True
        assert torch.equal(changed, expected)


def test_company_and_what_stands_behind_a_text_change_nothing(make_model: MakeModel) -> None:
    model, ids = make_model(), some_ids(6, 8)
    wanted = []
    for row in range(6):
        alone = Decoder(model, 1, 30)
        alone.prefill(0, ids[row, :7].tolist())
        wanted.append(alone.step([int(ids[row, 7])], [0])[0])
    decoder = Decoder(model, 9, 30)
    fill(decoder)
    for row in range(6):
        decoder.prefill(row + 3, ids[row, :7].tolist())
    for rows in ([5], [0, 1, 2, 3, 4, 5], [4, 2], [1, 0, 5]):
        found = decoder.step([int(ids[row, 7]) for row in rows], [row + 3 for row in rows])
        torch.testing.assert_close(found, torch.stack([wanted[row] for row in rows]), **CLOSE)
        for row in rows:
            decoder.truncate(row + 3, 7)


@pytest.mark.parametrize("start", [253, 511])
def test_a_text_goes_on_over_the_end_of_a_length(make_model: MakeModel, start: int) -> None:
    model, ids = make_model(), some_ids(2, 520)
    with torch.no_grad():
        full = model(ids)
    decoder = Decoder(model, 3, 600)
    decoder.prefill(0, ids[0, :start].tolist())
    decoder.prefill(2, ids[1, : start - 50].tolist())
    for step in range(6):
        found = decoder.step([int(ids[0, start + step]), int(ids[1, start - 50 + step])], [0, 2])
        torch.testing.assert_close(found, torch.stack([full[0, start + step], full[1, start - 50 + step]]), **CLOSE)


def test_guessed_tokens_go_on_over_the_end_of_a_length_and_fill_the_slot(make_model: MakeModel) -> None:
    model, ids = make_model(), some_ids(1, 260)
    with torch.no_grad():
        full = model(ids)[0]
    decoder = Decoder(model, 1, 260)
    decoder.prefill(0, ids[0, :254].tolist())
    torch.testing.assert_close(decoder.step(ids[0, 254:257].tolist(), [0] * 3), full[254:257], **CLOSE)
    torch.testing.assert_close(decoder.step(ids[0, 257:].tolist(), [0] * 3), full[257:], **CLOSE)


def test_a_slot_whose_numbers_are_not_finite_can_be_cleared(make_model: MakeModel) -> None:
    model, ids = make_model(), some_ids(1, 5)
    decoder = Decoder(model, 2, 20)
    for part in (*decoder._cache.keys, *decoder._cache.values):
        part[1] = float("nan")
    decoder.clear(1)
    decoder.prefill(1, ids[0, :4].tolist())
    with torch.no_grad():
        wanted = model(ids)[0, -1]
    torch.testing.assert_close(decoder.step([int(ids[0, 4])], [1])[0], wanted, **CLOSE)


@pytest.fixture(scope="module")
def layered() -> ModelConfig:
    """Six layers of six widths and two numbers of heads."""
    choice = ModelChoice(
        layers=6, dim=64, head_dim=16, gqa_groups=2, qkv_multipliers=(0.5, 1.0), ffn_dim_divisor=32, context=600
    )
    config = choice.config(31)
    assert len(set(config.plan.ffn_dims)) == 6 and len(set(config.plan.query_heads)) == 2
    return config


class Reading(TorchDispatchMode):
    """Refuses what makes a device bring numbers to the host."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        aten = torch.ops.aten
        assert function.overloadpacket not in (aten._local_scalar_dense, aten.nonzero, aten.masked_select)
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):  # a mask's places are counted
            assert all(index is None or index.dtype == torch.int64 for index in arguments[1])
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("slots", [[0], [2, 0], [4], [1, 1, 0]], ids=str)
def test_no_operator_of_a_step_needs_a_number_on_the_host(make_model: MakeModel, slots: list[int]) -> None:
    decoder = Decoder(make_model(torch.float64), 5, 40)  # float64: nothing of it is in C++
    shape, table = decoder._static._laid_out(slots, slots, list(range(3, 3 + len(slots))))
    decoder._static._logits(shape, table)  # makes the rotary table, which is not part of a step
    with torch.no_grad(), Reading():  # which inference mode would not ask
        decoder._static._logits(shape, table)
    with pytest.raises(AssertionError), Reading():
        int(table[0, 0])


def quantized(model: OpenELM, bits: int) -> OpenELM:
    """Return a model that holds the matrices of another one in few bits."""
    found = OpenELM(model.config)
    hold_quantized(found, Quantization(bits=bits, group_size=32))  # type: ignore[arg-type]
    plain, held = dict(model.named_modules()), dict(found.named_modules())
    for name, module in held.items():
        if isinstance(module, QuantizedMatrix):
            module.weight, module.scales, module.biases = rounded(plain[name].weight.detach(), bits, 32)
    rest = {name: value for name, value in model.state_dict().items() if "norm" in name}
    found.load_state_dict(rest, strict=False)
    return found.to(next(iter(model.parameters())).dtype)


STEPS: list[list[int]] = [[0], [0], [0, 1], [2, 1, 0], [4], [0, 0, 1, 0], [0, 1, 2, 3, 4]]
"""Slots of each step: one row, several, gathered ones, several tokens of a slot."""


def both(model: OpenELM, steps: Sequence[list[int]], tolerance: float, starts: Sequence[int] = ()) -> None:
    """Compare plain and compiled steps, logits and cache."""
    plain, other = Decoder(model, 5, 600), Decoder(model, 5, 600, compiles=True)
    for decoder in (plain, other):
        for slot, start in enumerate(starts):
            decoder.prefill(slot, some_ids(start, seed=slot).tolist())
    for number, slots in enumerate(steps):
        ids = some_ids(len(slots), seed=number).tolist()
        wanted, found = plain.step(ids, slots), other.step(ids, slots)
        assert float((found - wanted).abs().max()) <= tolerance, slots
    for part, same in zip(
        plain._cache.keys + plain._cache.values, other._cache.keys + other._cache.values, strict=True
    ):
        assert float((part - same).abs().max()) <= tolerance


@compiling
def test_compiled_steps_are_plain_ones_in_few_graphs(layered: ModelConfig, compiler: Callable[[str], None]) -> None:
    """Without a break, or `fullgraph` would raise."""
    compiler("aot_eager")
    model = OpenELM(layered)
    model.initialise(torch.Generator().manual_seed(0))
    both(model, STEPS[:3], 2e-5)
    assert (
        counters["stats"]["unique_graphs"] <= 6
    )  # two numbers of heads and the output matrix, for one row and several


@compiling
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inductors_steps_are_plain_ones_in_every_kind_of_shape(
    layered: ModelConfig, compiler: Callable[[str], None]
) -> None:
    compiler("inductor")
    model = OpenELM(layered)
    model.initialise(torch.Generator().manual_seed(0))
    both(model, STEPS, 3e-5)
    both(model, [[0], [0, 1]], 3e-5, starts=(300, 20))


@compiling
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, None), (torch.bfloat16, 4), (torch.float32, 8)], ids=str)
def test_inductors_steps_are_plain_ones_for_every_kind_of_weights(
    layered: ModelConfig, compiler: Callable[[str], None], dtype: torch.dtype, bits: int | None
) -> None:
    compiler("inductor")
    model = OpenELM(layered)
    model.initialise(torch.Generator().manual_seed(0))
    model = model.to(dtype)
    model = quantized(model, bits) if bits else model
    both(model, STEPS[:3], 3e-5 if dtype == torch.float32 else 0.15)


@compiling
@pytest.mark.slow
def test_inductors_code_writes_into_the_cache_and_copies_none(
    layered: ModelConfig, compiler: Callable[[str], None]
) -> None:
    from torch._inductor.utils import run_and_get_code

    compiler("inductor")
    model = OpenELM(layered)
    model.initialise(torch.Generator().manual_seed(0))
    decoder = Decoder(model, 5, 599, compiles=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(lambda: decoder.step([1], [0]))
    allocations = [line for code in codes for line in code.splitlines() if "= empty_strided" in line]
    assert any("256" in line for line in allocations)  # the mask
    assert not any("599" in line for line in allocations)


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_times_words_is_one_loop_that_reads_words(bits: int, compiler: Callable[[str], None]) -> None:
    from torch._inductor.utils import run_and_get_code

    compiler("inductor")
    generator = torch.Generator().manual_seed(0)
    packed = rounded(torch.randn(96, 320, generator=generator).bfloat16(), bits, 64)
    product = torch.compile(functools.partial(quantized_linear, bits=bits, group=64), fullgraph=True)
    for rows in (1, 3):
        x = torch.randn(1, rows, 320, generator=generator).bfloat16()
        with torch._inductor.config.patch(force_disable_caches=True):
            found, codes = run_and_get_code(product, x, *packed)
        torch.testing.assert_close(found, quantized_linear(x, *packed, bits, 64), atol=0.3, rtol=0)  # of about 60
        code = "\n".join(codes)
        assert ("empty_strided_cpu((96, 320)" in code) == ("extern_kernels.mm(" in code) == (rows > 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and `pytest -m gpu`")
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@compiling
def test_recorded_steps_are_those_of_the_layers(
    layered: ModelConfig, dtype: torch.dtype, bits: int | None, compiles: bool
) -> None:
    """Shapes alternate: graphs share memory, and what one gave stays as it was when another one has run."""
    model = OpenELM(layered)
    model.initialise(torch.Generator().manual_seed(0))
    model = model.to(dtype)
    model = (quantized(model, bits) if bits else model).to("cuda")
    plain, recorded = Decoder(model, 5, 600), Decoder(model, 5, 600, compiles=compiles)
    plain._static._records = False
    for decoder in (plain, recorded):
        decoder.prefill(1, some_ids(251).tolist())
    wanted, found = [], []
    for _ in range(3):
        for number, slots in enumerate(STEPS):
            ids = some_ids(len(slots), seed=number).tolist()
            wanted.append(plain.step(ids, slots))
            found.append(recorded.step(ids, slots))
    assert isinstance(recorded._static, StaticStep) and len(recorded._static._recorded) >= 5
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4 if dtype == torch.float32 else 0.15, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and `pytest -m gpu`")
def test_a_recorded_step_never_waits_for_the_device(layered: ModelConfig) -> None:
    model = OpenELM(layered)
    model.initialise(torch.Generator().manual_seed(0))
    decoder = Decoder(model.to("cuda"), 2, 64)
    decoder.step([1, 2], [0, 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.step([3, 4], [0, 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
