"""What the callbacks for trainers share, where no trainer is needed."""

from __future__ import annotations

import pytest

from foreshock import _log
from foreshock.integrations.trainer_watch import TrainerWatch


def test_a_trainer_that_tells_no_optimizer_trains_unwatched_and_keeps_its_clipping(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _log._logged.clear()
    watch = TrainerWatch(clip=1.0)
    watch.begin(None, 1.0)
    assert not watch.clips and not watch.watch.enabled
    assert caplog.messages == [
        "not watching: this version of the trainer hands callbacks no optimizer; call foreshock.attach"
    ]
