from concurrent.futures import ThreadPoolExecutor

import torch

from svdcli.linalg.layouts import CODECS
from svdcli.linalg.machine import keep_temporaries, keeping_temporaries, temporary
from svdcli.linalg.solvers import gram

LIKE = torch.empty(0)


def test_a_thread_that_keeps_temporaries_takes_the_same_memory_again() -> None:
    with keeping_temporaries():
        first = temporary("a", (30, 20), LIKE)
        second = temporary("a", (10, 7), LIKE.double())
        other = temporary("b", (30, 20), LIKE)
        assert (second.dtype, second.shape) == (torch.float64, (10, 7))
        assert second.data_ptr() == first.data_ptr() != other.data_ptr()
        larger = temporary("a", (31, 20), LIKE)
        assert larger.shape == (31, 20)
        assert larger.data_ptr() == temporary("a", (1,), LIKE).data_ptr()


def test_any_other_thread_gets_memory_of_its_own() -> None:
    one, other = temporary("a", (30, 20), LIKE), temporary("a", (30, 20), LIKE)
    assert one.data_ptr() != other.data_ptr()
    with keeping_temporaries():
        kept = temporary("a", (30, 20), LIKE)
        with ThreadPoolExecutor(1, initializer=keep_temporaries) as pool:
            assert pool.submit(temporary, "a", (30, 20), LIKE).result().data_ptr() not in (
                kept.data_ptr(),
                one.data_ptr(),
                other.data_ptr(),
            )
    assert temporary("a", (30, 20), LIKE).data_ptr() != kept.data_ptr()


def test_what_was_solved_outlives_the_memory_it_was_solved_in() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(*shape, generator=generator) for shape in ((90, 128), (300, 64), (1024, 1030))
    ]
    alone = [gram(w, 20) for w in weights]
    with keeping_temporaries():
        together = [gram(w, 20) for w in weights]
        energies = [
            CODECS["factored"].residual(w, (f.up, f.down))
            for w, f in zip(weights, together, strict=True)
        ]
    for w, one, other, energy in zip(weights, alone, together, energies, strict=True):
        assert torch.equal(one.up, other.up)
        assert torch.equal(one.down, other.down)
        assert energy == CODECS["factored"].residual(w, (one.up, one.down))
