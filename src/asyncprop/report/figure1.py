"""Figure 1 of the paper as a trace: what one forward thread and its backward threads do, undisturbed."""

from __future__ import annotations

from asyncprop.trace import Event, Trace


def figure1(batches: int = 4, layers: int = 3, backward_threads: int = 2, backward_forward_ratio: float = 2.0) -> Trace:
    """Return the timeline that the paper draws, under the assumptions of its Sec. 3.3.

    A forward pass takes a second for each layer, and the next begins as it ends; so does its backward pass, if a
    backward thread is free. Layers are written as soon as their gradients are ready (Sec. 3.2).

    Args:
        batches: how many pass through.
        layers: of the network; L1 is the first.
        backward_threads: those beside the one forward thread.
        backward_forward_ratio: time of a backward pass over that of a forward pass, beta.
    """
    events: list[Event] = []
    free_at = [0.0] * backward_threads
    for batch in range(batches):
        start, end = float(batch * layers), float((batch + 1) * layers)
        events.append(Event("forward", start, end, 0, batch=batch))
        for layer in range(layers):
            at = start + layer
            events.append(Event("read", at, at, 0, batch=batch, layer=layer))
        place = min(range(backward_threads), key=free_at.__getitem__)
        start = max(end, free_at[place])
        free_at[place] = end = start + backward_forward_ratio * layers
        events.append(Event("backward", start, end, place + 1, batch=batch))
        for layer in reversed(range(layers)):
            at = start + backward_forward_ratio * (layers - layer)
            events.append(Event("ready", at, at, place + 1, batch=batch, layer=layer))
            events.append(Event("write", at, at, place + 1, batch=batch, layer=layer))
    events.sort(key=lambda event: event.start_s)
    names = ("forward", *(f"backward {number}" for number in range(1, backward_threads + 1)))
    return Trace(tuple(f"L{number}" for number in range(1, layers + 1)), names, events)
