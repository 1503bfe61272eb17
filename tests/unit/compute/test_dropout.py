"""Fast dropout: its share, its gradient, its places and its state."""

from __future__ import annotations

from typing import Any

import torch
from tests.unit.compute.encoders import CONFIGS, model_of

from afina.worker.compute import dropout


def test_fast_dropout_keeps_the_right_share_and_its_mean() -> None:
    dropout.seed(5, 0)
    for p in (0.1, 0.5, 1 / 3):
        layer = dropout.FastDropout(p).train()
        x = torch.ones(2_000_000, requires_grad=True)
        y = layer(x)
        share = float((y == 0).float().mean())
        assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5, (p, share)
        assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
        y.backward(torch.ones_like(y))
        assert torch.equal(x.grad, y.detach()), "the gradient goes through the same mask"
        assert torch.equal(layer.eval()(x), x)
    exact = dropout.keep_mask(torch.arange(-32768, 32768).to(torch.int16), 0.1, torch.float32)
    assert int((exact == 0).sum()) == round(65536 * 0.1)


def test_fast_dropout_replaces_every_dropout() -> None:
    model = model_of(CONFIGS["bert"])
    places = sum(isinstance(m, torch.nn.Dropout) for m in model.modules())
    assert dropout.use_fast_dropout(model) == places > 5
    assert all(isinstance(m, dropout.FastDropout) for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert dropout.use_fast_dropout(model) == 0


def test_random_numbers_follow_from_the_saved_state(tmp_path: Any) -> None:
    from afina.worker.survival.snapshot import random_state, set_random_state

    dropout.seed(1, 0)
    dropout.random_bits(3)  # a draw that does not fill a word
    torch.save([{"random": random_state()}], tmp_path / "ranks.pt")
    following = [dropout.random_bits(1001), dropout.random_bits(2, 3)]
    dropout.seed(9, 9)
    set_random_state(torch.load(tmp_path / "ranks.pt", weights_only=True)[0]["random"])
    again = [dropout.random_bits(1001), dropout.random_bits(2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(following, again, strict=True))
    dropout.seed(1, 1)
    other = dropout.random_bits(1003)[3:]
    dropout.seed(1, 0)
    assert not torch.equal(dropout.random_bits(1003)[3:], other), "ranks have independent streams"
