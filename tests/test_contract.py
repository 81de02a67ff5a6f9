"""Every public function with arguments that nobody should give it.

`tests/_contract.py` has the functions with valid arguments. Here these are spoilt one at a time. A
function refuses, in one line that names the argument, or gives a number that is seen to be none, or
the right one. What else a loss promises `logitjax.testing.check_loss` checks, as it does of losses
from elsewhere. `tests/test_zero_weights.py` is the column of zero weights of all losses,
`tests/test_classifier_inputs.py` has what is particular to classifiers.
"""

import functools
import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests._contract import BATCH, ELSEWHERE, PACKAGES, TABLE, VOCAB

LINE = re.compile(r"[\w.\[\]'/ -]+: expected [^\n]+")
_compiled = {}


@pytest.fixture(autouse=True)
def _errors_of_our_own(monkeypatch):
    # Users have no checks of annotations: what is refused has to be refused by the library.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def run(name, arrays):
    """Compiled once for a function, whatever numbers there are; as numpy has them."""
    case = TABLE[name]
    if name not in _compiled:
        _compiled[name] = case.call if case.host else jax.jit(case.call)
    return numbers(jax.device_get(_compiled[name](**arrays)))


@functools.cache
def unspoilt(name):
    return run(name, TABLE[name].arrays)


def numbers(tree):
    leaves = map(np.asarray, jax.tree.leaves(tree))
    return [x.astype(np.float64) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def refusal(call, arrays):
    """The message of an error, None without one; other errors than ours have none."""
    try:
        call(**arrays)
    except (TypeError, ValueError) as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return None


def traced(name, arrays):
    """As `refusal`, without computing anything."""
    call = TABLE[name].call
    return refusal(call if TABLE[name].host else lambda **x: jax.eval_shape(call, **x), arrays)


def unlike(message, also=""):
    """Whether there was no error, or one that is not a line of ours."""
    return message is None or LINE.fullmatch(message) is None or also not in message


def complain(wrong):
    assert not wrong, "\n".join(wrong)


def spoilt(selected=lambda case: True):
    """`(name, case, array's name, array)` of all that is to be spoilt."""
    for name, case in TABLE.items():
        for key, x in case.arrays.items() if selected(case) else ():
            yield name, case, key, x


def test_every_public_name_is_here_or_has_a_reason():
    public = {
        f"{package}.{name}"
        for package in PACKAGES
        for name, value in vars(importlib.import_module(f"logitjax.{package}")).items()
        if not name.startswith("_") and not inspect.ismodule(value)
        if getattr(value, "__module__", "").startswith(f"logitjax.{package}")
    }
    here = {name.partition(",")[0] for name in TABLE}
    elsewhere = {name for names in ELSEWHERE.values() for name in names.split()}
    assert not here & elsewhere
    assert public == here | elsewhere, sorted(public ^ (here | elsewhere))


def test_arrays_of_another_kind_are_refused():
    wrong = []
    for name, case, key, x in spoilt():
        whole = x.dtype == np.int32
        if not whole and x.dtype != bool and (case.keeps or key in case.integers):
            continue
        message = traced(name, {**case.arrays, key: x.astype(np.float32 if whole else np.int32)})
        if unlike(message):
            wrong.append(f"{name}, {key}: {message}")
    complain(wrong)


def test_an_axis_too_few_or_too_many_is_refused():
    wrong = []
    for name, case, key, x in spoilt():
        ranks = [] if key in case.loose else [x.reshape(-1)[0]]
        if (
            ranks
            and len(case.arrays) > 1
            and key not in (*case.several, *(k for k, n in case.free if n == BATCH))
        ):
            ranks.append(np.stack([x, x, x]))
        for other in ranks:
            message = traced(name, {**case.arrays, key: other})
            if unlike(message):
                wrong.append(f"{name}, {key} of {other.ndim} axes: {message}")
    complain(wrong)


def test_an_entry_too_few_is_refused():
    wrong = []
    for name, case, key, x in spoilt(lambda case: len(case.arrays) > 1):
        for axis, size in enumerate(x.shape):
            if (key, size) in case.free or key in case.loose:
                continue
            message = traced(name, {**case.arrays, key: np.take(x, range(size - 1), axis)})
            if unlike(message):
                wrong.append(f"{name}, {key} along {axis}: {message}")
    complain(wrong)


@pytest.mark.parametrize("size", [BATCH, VOCAB], ids=["batch", "vocabulary"])
def test_of_nothing_there_is_nothing_or_an_error(size):
    wrong = []
    for name, case in TABLE.items():
        arrays = {
            key: x[tuple(slice(0 if n == size else n) for n in x.shape)]
            for key, x in case.arrays.items()
        }
        if (case.host and size == BATCH) or all(x.size for x in arrays.values()):
            continue
        message = traced(name, arrays)
        if message is not None:
            fine = not unlike(message)
        elif size == BATCH and case.rows:
            fine = 0 in jax.tree.leaves(jax.eval_shape(case.call, **arrays))[0].shape
        else:
            fine = size == BATCH or case.keeps
        if not fine:
            wrong.append(f"{name}: {message}")
    complain(wrong)


def test_one_row_is_as_good_as_several():
    for name, case in TABLE.items():
        if case.rows:
            arrays = {
                key: x[:1] if x.shape[:1] == (BATCH,) else x for key, x in case.arrays.items()
            }
            assert jax.tree.leaves(jax.eval_shape(case.call, **arrays))[0].shape[0] == 1, name


def test_half_precision_gives_float32_and_float64_stays():
    wrong = []
    for kind in ("bfloat16", "float16", "float64"):
        with jax.enable_x64(kind == "float64"):
            for name, case in TABLE.items():
                if case.host:
                    continue
                arrays = {
                    key: x.astype(jnp.dtype(kind)) if x.dtype == np.float32 else x
                    for key, x in case.arrays.items()
                }
                leaves = jax.tree.leaves(jax.eval_shape(case.call, **arrays))
                types = {str(x.dtype) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}
                kept = kind if case.keeps or (kind == "float64" and not case.single) else "float32"
                if types != {kept} | (types & set(case.beside)):
                    wrong.append(f"{name}, {kind}: {types}")
    complain(wrong)


LOSSES = [name for name, case in TABLE.items() if case.loss is not None]


@pytest.mark.parametrize("name", [name for name in LOSSES if not TABLE[name].swept])
def test_a_loss_keeps_what_losses_promise(name):
    TABLE[name].check_loss("mesh", "explicit", "shard_map")


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_keeps_it_with_its_batch_split_over_devices(name):
    TABLE[name].check_loss()


@pytest.mark.many_programs("each function is compiled once, for this test and those below")
def test_a_number_that_is_none_is_seen():
    wrong = []
    for name, case, key, x in spoilt(lambda case: not case.swept and case.loss is None):
        assert not any(np.isnan(x).any() for x in unspoilt(name)), name
        for number in (np.nan, np.inf, -np.inf) if x.dtype == np.float32 else ():
            absent = key in case.logits and number == -np.inf
            other, index = x.copy(), [0] * x.ndim
            if absent:
                # Not the label's: its loss is infinite then.
                label = int(case.arrays.get("labels", np.zeros(1, int)).flat[0])
                index[-1] = (label + 1) % x.shape[-1]
            other[tuple(index)] = number
            arrays = {**case.arrays, key: other}
            if key in case.looks:
                message = refusal(case.call, arrays)
                if unlike(message, f"got {number} at"):
                    wrong.append(f"{name}, {key} {number}: {message}")
                continue
            leaves = run(name, arrays)
            outputs = np.concatenate([x.ravel() for x in leaves])
            if case.rows and x.shape[:1] == (BATCH,):
                # Rows are on their own: what spoils the first one is not seen in the second.
                pairs = zip(leaves, unspoilt(name), strict=True)
                if not all(np.allclose(a[1:], b[1:], equal_nan=True) for a, b in pairs):
                    wrong.append(f"{name}, {key} {number} in another row")
            if absent:
                fine = not np.isnan(outputs).any()
            elif np.isnan(number):
                fine = np.isnan(outputs).any()
            else:
                clean = np.concatenate([x.ravel() for x in unspoilt(name)])
                seen = np.isfinite(outputs) != np.isfinite(clean)
                fine = key in case.limits or seen.any()
            if not fine:
                wrong.append(f"{name}, {key} {number}: {outputs}")
    complain(wrong)


@pytest.mark.many_programs("runs after the test above without compiling")
def test_an_id_that_is_none_is_refused_or_nan():
    wrong = []
    for name, case, key, x in spoilt():
        count, outside = case.counts.get(key, (0, ""))
        for number in (count, 2**31 - 1, -1, -(2**31)) if count else ():
            if number < 0 and outside == "nan above":
                continue
            other = x.copy()
            other.flat[-1] = number
            arrays = {**case.arrays, key: other}
            if outside in ("error", "both"):
                message = refusal(case.call, arrays)
                if unlike(message, f"got {number} at"):
                    wrong.append(f"{name}, {key} {number}: {message}")
            if outside == "error" or case.swept or case.loss is not None:
                continue
            if not any(np.isnan(x).any() for x in run(name, arrays)):
                wrong.append(f"{name}, {key} {number} under jit: no nan")
    complain(wrong)


@pytest.mark.many_programs("runs after the tests above without compiling")
def test_a_mask_may_leave_out_everything():
    for name, case in TABLE.items():
        if case.where and not case.swept and case.loss is None:
            nothing = np.zeros_like(case.arrays[case.where])
            outputs = run(name, {**case.arrays, case.where: nothing})
            assert all(np.isfinite(x).all() for x in outputs), name
