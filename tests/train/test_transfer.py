"""Arrays on their way to the device: what arrives is np.concatenate, whatever was sent."""

from __future__ import annotations

import numpy as np
import torch

from train.transfer import Pace, send, send_joined

CPU = torch.device("cpu")


def test_joined_arrays_arrive_as_numpy_joins_them():
    rng = np.random.default_rng(0)
    patches = [rng.integers(0, 256, (n, 6), dtype=np.uint8) for n in (3, 0, 4)]
    assert np.array_equal(send_joined(patches, CPU).numpy(), np.concatenate(patches))
    # A view that repeats one row, as positions of text are, and a transposed one.
    positions = [np.broadcast_to(np.arange(4), (3, 4)), np.arange(6).reshape(2, 3).T]
    joined = send_joined(positions, CPU, axis=1)
    assert joined.dtype == torch.long and np.array_equal(joined.numpy(), np.concatenate(positions, axis=1))
    assert send_joined([], CPU).tolist() == [] and send_joined([], CPU).dtype == torch.long


def test_what_was_sent_is_a_copy_of_arrays():
    array = np.arange(5)
    sent = send_joined([array], CPU)
    array[0] = 9
    assert sent.tolist() == [0, 1, 2, 3, 4] and send(torch.tensor([1.5]), CPU).tolist() == [1.5]


def test_the_host_is_one_micro_batch_ahead(monkeypatch):
    """Micro-batch n is packed when n - 2 is done. Events note what was queued before them, on a device that never hurries."""
    queued, done, waited = [], [], []

    class Event:
        def record(self):
            self.after = list(queued)

        def synchronize(self):
            waited.append(list(self.after))
            done[:] = self.after

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace, in_flight = Pace(torch.device("cuda")), []
    for number in range(4):
        pace.wait()
        in_flight.append(len(queued) - len(done))
        queued.append(number)
    assert in_flight == [0, 1, 1, 1] and waited == [[], [0], [0, 1]]
    Pace(CPU).wait()
    assert len(waited) == 3
