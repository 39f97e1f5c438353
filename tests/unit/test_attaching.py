"""When a volume counts as fenced after an attach for writing: `is_fenced` on its own."""

from __future__ import annotations

from dataclasses import replace

from tests.support.views import EPOCH, KEY, Situation

from pureflash.conductor.attaching import is_fenced


def fenced(situation: Situation, *, attach_epoch: int = 2) -> bool:
    """Ask after a configuration with attach epoch 2, one above what the stores have told."""
    view = situation.view()
    conf = replace(situation.conf(), epoch=EPOCH + 1, attach_epoch=2)
    return is_fenced(replace(view, shards={KEY: conf}), KEY[0], attach_epoch)


def test_a_stored_configuration_fences_nobody() -> None:
    assert not fenced(Situation())


def test_one_member_that_follows_it_does() -> None:
    assert fenced(Situation().tell(3, epoch=EPOCH + 1))


def test_one_that_is_not_in_the_isr_does_not() -> None:
    assert not fenced(Situation(isr=(0, 1)).tell(3, epoch=EPOCH + 1))


def test_it_has_to_be_of_this_attach() -> None:
    assert not fenced(Situation().tell(3, epoch=EPOCH + 1), attach_epoch=3)


def test_a_volume_that_is_gone_has_no_writers() -> None:
    assert is_fenced(Situation().view(), KEY[0] + 1, 2)
