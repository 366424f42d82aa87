"""Costs: what a file may say, and what a trace tells where no layer's module is called."""

import pytest

from asyncprop.simulate import read_costs
from asyncprop.simulate.measure import costs_of
from asyncprop.trace import Event, Trace


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layers = 3", r"costs: layers must be tables, one for each layer \(.* has 3\)"),
        ("layers = [1, 2]", r"costs: layers must be tables, one for each layer \(.* has \[1, 2\]\)"),
        ("layers.a = 3", r"costs: forward_s must be a number >= 0 \(.*: a has None\)"),
        ("forward_s = true\nbackward_s = 1", r"costs: forward_s must be a number > 0 \(.* has True\)"),
        ("forward_s = 1\nbackward_s = 1\nvariation = false", r"costs: variation must be a number .* has False\)"),
    ],
)
def test_what_is_no_number_and_no_table_is_refused(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_costs(str(path))


def test_layers_that_no_module_is_called_for_share_the_forward_pass() -> None:
    """Weights that are used by functions alone: passes of 3 and 4 s, 1 s apart, with nothing read."""

    def a_pass(batch: int, start: float) -> list[Event]:
        spans = [("forward", 0, 3, -1), ("backward", 3, 7, -1), ("ready", 6, 6, 1), ("ready", 7, 7, 0)]
        return [Event(kind, start + at, start + to, 0, batch=batch, layer=layer) for kind, at, to, layer in spans]

    costs = costs_of(Trace(("0", "1"), ("worker-0",), [*a_pass(0, 0.0), *a_pass(1, 8.0)]))
    assert costs.forward_s == (2.0, 2.0)
    assert costs.backward_s == (1.0, 3.0)
