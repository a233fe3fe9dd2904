"""Whether a program fits, and the search for the largest batch that does."""

import types

import jax
import pytest

from vlab_jax.compiling import fitting, topologies

GIB = 2**30


class Lowered:
    """A lowered program that compiles to so many bytes, or whose compilation fails."""

    def __init__(self, arguments=0, temporaries=0, results=0, aliased=0, peak=0, message=""):
        self.message = message
        self.memory = types.SimpleNamespace(
            argument_size_in_bytes=arguments,
            temp_size_in_bytes=temporaries,
            output_size_in_bytes=results,
            alias_size_in_bytes=aliased,
            peak_memory_in_bytes=peak,
        )

    def compile(self):
        if self.message:
            raise jax.errors.JaxRuntimeError(self.message)
        return types.SimpleNamespace(memory_analysis=lambda: self.memory, as_text=lambda: "HloModule")


def test_a_program_that_a_tpu_refuses_does_not_fit():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage >= 20.76G:\n"
    )
    found = fitting.compile_program(Lowered(message=message), topologies.parse("v5e:2x4"), 4 * GIB)
    assert not found.fits
    assert (found.needed, found.available) == (20.5 * GIB, 15.75 * GIB)
    assert found.temporaries == 16.5 * GIB
    assert found.text == ""


def test_both_error_messages_of_a_tpu_are_parsed():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (38.5T) exceeds "
        "available HBM (31.25G)."
    )
    assert fitting.parse_out_of_memory(message) == (38.5 * 1024 * GIB, 31.25 * GIB)
    assert fitting.parse_out_of_memory("RESOURCE_EXHAUSTED: of something else") == (0.0, 0.0)


def test_other_errors_of_the_compiler_are_raised():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fitting.compile_program(Lowered(message="INTERNAL: a fault"), topologies.parse("v5e:2x4"), 0)


def test_a_tpu_needs_its_peak_memory():
    """Its compiler reuses memory, so that the peak is less than the sum of all arrays."""
    lowered = Lowered(arguments=4 * GIB, temporaries=12 * GIB, peak=14 * GIB)
    found = fitting.compile_program(lowered, topologies.parse("v5e:2x4"), 4 * GIB)
    assert found.fits and (found.needed, found.temporaries) == (14 * GIB, 10 * GIB)


def test_on_a_gpu_results_in_the_memory_of_arguments_count_once(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # 69.9 GiB
    h200 = topologies.parse("h200")
    full = {"arguments": 20 * GIB, "results": 20 * GIB, "aliased": 19 * GIB}
    found = fitting.compile_program(Lowered(**full, temporaries=48 * GIB), h200, 20 * GIB)
    assert found.fits and found.text
    assert (found.needed, found.temporaries) == (69 * GIB, 49 * GIB)
    assert not fitting.compile_program(Lowered(**full, temporaries=49 * GIB), h200, 20 * GIB).fits


class Machine:
    """A machine of 15 GiB, with a program of 3 GiB plus 1 GiB per 100 clips plus a quadratic part."""

    def __init__(self, bend=0.0):
        self.bend, self.tried = bend, []

    def __call__(self, batch):
        self.tried.append(batch)
        needed = 3 * GIB + batch / 100 * GIB + self.bend * batch**2
        return fitting.CompileResult(needed <= 15 * GIB, needed, 15.0 * GIB, 0.0)


@pytest.mark.parametrize("start", [8, 512, 1200, 4096, 65536])
@pytest.mark.parametrize("bend", [0.0, 2000.0, -50.0])
def test_the_largest_batch_is_found_with_few_compiles(start, bend):
    machine = Machine(bend)
    found = fitting.largest_batch(machine, start, 8, 3 * GIB)
    exact = max(batch for batch in range(8, 4096, 8) if Machine(bend)(batch).fits)
    assert found % 8 == 0
    assert exact * 15 / 16 - 8 <= found <= exact
    assert found in machine.tried
    assert len(machine.tried) <= fitting.MAX_COMPILES


def test_if_not_even_the_smallest_batch_fits_the_result_is_zero():
    def never(batch):
        return fitting.CompileResult(False, 20.0 * GIB + batch, 15.0 * GIB, 0.0)

    assert fitting.largest_batch(never, 512, 8, 18 * GIB) == 0
