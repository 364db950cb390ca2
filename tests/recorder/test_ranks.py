"""What the recorder says about a rank, and when. Time is an argument here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from foreshock_protos.columns import MEASURED_NAMES
from foreshock_protos.v1 import telemetry_pb2 as pb
from foreshock_recorder.layout import EDITED, GRADIENT_UNKNOWN, NOT_STEPPED, ExitReason, NormHistory
from foreshock_recorder.ranks import Rank
from foreshock_recorder.ring import Ring
from tests.support.listeners import Listener, kinds
from tests.support.rings import begin, identity, make_ring, measure, step

Said = Callable[..., list[pb.FromRecorder]]


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return make_ring(tmp_path)


def test_hello_says_who_it_is_and_nothing_follows_before_the_answer(ring: Ring) -> None:
    step(ring, 1)
    listener = Listener(ring)
    (message,) = listener.ask()
    hello, told = message.hello, identity()
    assert (hello.instance, hello.run, hello.launch_id) == (told["instance"], told["run"], told["launch_id"])
    assert (hello.topology.rank, hello.topology.world_size, hello.topology.node) == (0, 2, "node-7")
    assert list(hello.model.layers) == ["a", "b"] and dict(hello.model.module_types) == {"Linear": 2}
    assert (hello.optimizer.type, hello.optimizer.fused, hello.clip) == ("SGD", False, "norm 1.0")
    assert listener.ask(after=5.0) == []


def test_what_the_collector_says_of_the_run_is_written_for_the_rank(ring: Ring) -> None:
    listener = Listener(ring)
    assert ring.notice == ""
    for notice in ("Build-up of the gradient norm at step 7", "Exploding gradients: …"):
        listener.rank.acknowledge(pb.Ack.Position(instance=listener.rank.instance, notice=notice))
        assert ring.notice == notice
    # An acknowledgement need not repeat it.
    listener.rank.acknowledge(pb.Ack.Position(instance=listener.rank.instance))
    assert ring.notice == "Exploding gradients: …"


def test_the_history_that_the_collector_answers_is_written_for_the_rank(ring: Ring) -> None:
    listener = Listener(ring).greet()
    assert [ring.history] == [None]
    known = pb.NormHistory(mean=0.1, recent=0.2, deviation=0.3, count=400, learning_rate=1e-3)
    listener.rank.acknowledge(pb.Ack.Position(instance=listener.rank.instance, history=known))
    assert ring.history == NormHistory(mean=0.1, recent=0.2, deviation=0.3, steps=400, learning_rate=1e-3)


def test_columns_carry_what_the_ring_holds(ring: Ring) -> None:
    for sequence in (1, 2, 3):
        step(ring, sequence)
    (batch,) = Listener(ring).greet().batches()
    assert batch.first_sequence == 1 and list(batch.step) == [101, 102, 103]
    assert list(batch.learning_rate) == [0.5] * 3 and list(batch.loss) == [0.25] * 3
    for i, name in enumerate(MEASURED_NAMES):
        if name not in ("skipped", "shadow") and "nan_" not in name and "inf_" not in name:
            assert list(getattr(batch, name)) == [pytest.approx(n + i / 100) for n in (1, 2, 3)], name
    assert list(batch.flags) == [pb.LOSS_OBSERVED | pb.LOCAL_NORMS] * 3
    assert list(batch.global_layer_norms) == [1.5, 2.5, 2.5, 3.5, 3.5, 4.5]
    assert list(batch.local_layer_norms) == [3.5, 4.5, 4.5, 5.5, 5.5, 6.5]


def test_only_rank_0_tells_the_layers_of_the_average(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, 1)
    step(ring, 1)
    (batch,) = Listener(ring).greet().batches()
    assert not batch.global_layer_norms and len(batch.local_layer_norms) == 2


def test_without_local_norms_no_row_claims_them(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, capabilities=[])
    step(ring, 1)
    (batch,) = Listener(ring).greet().batches()
    assert list(batch.flags) == [pb.LOSS_OBSERVED] and not batch.local_layer_norms


def test_flags_say_what_happened_to_a_step(ring: Ring) -> None:
    ring.begin_step(1, step=1, wall=0, monotonic=0, learning_rate=0, flags=EDITED)
    measure(ring, 1, skipped=1.0)
    ring.write_observed(1, step=None, loss=None)
    (batch,) = Listener(ring).greet().batches()
    assert batch.flags[0] == pb.EDITED | pb.SKIPPED | pb.LOCAL_NORMS


def test_a_step_whose_optimizer_was_never_called_says_so(ring: Ring) -> None:
    ring.begin_step(1, step=1, wall=0, monotonic=0, learning_rate=0, flags=NOT_STEPPED | GRADIENT_UNKNOWN)
    measure(ring, 1)
    ring.write_observed(1, step=None, loss=math.nan)
    (batch,) = Listener(ring).greet().batches()
    assert batch.flags[0] == pb.NOT_STEPPED | pb.GRADIENT_UNKNOWN | pb.LOSS_OBSERVED | pb.LOCAL_NORMS


def test_a_batch_tells_how_many_backward_passes_the_rank_has_computed(ring: Ring) -> None:
    for _ in range(3):
        ring.count_backward_pass()
    step(ring, 1)
    (batch,) = Listener(ring).greet().batches()
    assert batch.backward_passes == 3


def test_a_record_waits_half_a_second_for_its_loss(ring: Ring) -> None:
    step(ring, 1)
    begin(ring, 2)
    measure(ring, 2)
    listener = Listener(ring).greet()
    assert listener.sequences(interval=0.0) == [1]
    assert listener.sequences(after=0.4, interval=0.0) == []
    ring.write_observed(2, step=None, loss=4.0)
    (batch,) = listener.batches(interval=0.0)
    assert list(batch.loss) == [4.0]


def test_a_script_that_tells_no_loss_is_not_waited_for_longer(ring: Ring) -> None:
    step(ring, 1)
    begin(ring, 2)
    measure(ring, 2)
    listener = Listener(ring).greet()
    assert listener.sequences(interval=0.0) == [1]
    (batch,) = listener.batches(after=0.5, interval=0.0)
    assert batch.first_sequence == 2 and batch.flags[0] == pb.LOCAL_NORMS and math.isnan(batch.loss[0])


def test_the_first_record_waits_for_the_step_number_of_a_resumed_script(ring: Ring) -> None:
    begin(ring, 1)
    measure(ring, 1)
    listener = Listener(ring).greet()
    assert listener.sequences(interval=0.0) == []
    assert listener.sequences(after=4.9, interval=0.0) == []
    ring.write_observed(1, step=70_000, loss=1.0)
    (batch,) = listener.batches(interval=0.0)
    assert list(batch.step) == [70_000]


@pytest.mark.parametrize("after", [0.0, 5.0])
def test_the_first_record_waits_no_longer_than_the_second_or_five_seconds(ring: Ring, after: float) -> None:
    begin(ring, 1)
    measure(ring, 1)
    listener = Listener(ring).greet()
    assert listener.sequences(interval=0.0) == []
    if not after:
        step(ring, 2)
    assert 1 in listener.sequences(after=after, interval=0.0)


def test_a_record_still_on_the_device_holds_up_the_ones_behind_it(ring: Ring) -> None:
    step(ring, 1)
    begin(ring, 2)
    begin(ring, 3)
    listener = Listener(ring).greet()
    assert listener.sequences() == [1]
    assert listener.sequences(after=3600) == []
    measure(ring, 2)
    measure(ring, 3)
    assert listener.sequences(after=1.0) == [2]
    assert listener.sequences(after=1.0) == [3]


def test_a_record_that_the_probe_failed_on_is_incomplete_and_blocks_nothing(ring: Ring) -> None:
    step(ring, 1)
    begin(ring, 2)
    begin(ring, 3)
    step(ring, 4)
    (batch,) = Listener(ring).greet().batches()
    assert list(batch.step) == [101, 102, 103, 104]
    assert [bool(flags & pb.INCOMPLETE) for flags in batch.flags] == [False, True, True, False]
    assert len(batch.global_layer_norms) == 4 * 2


def test_a_probe_that_fails_on_every_record_still_shows_its_steps(ring: Ring) -> None:
    for sequence in range(1, 60):
        begin(ring, sequence)
    assert Listener(ring).greet().sequences() == list(range(1, 12))


def test_a_last_record_that_never_finished_is_told_once_the_rank_is_gone(ring: Ring) -> None:
    step(ring, 1)
    begin(ring, 2)
    listener = Listener(ring).greet()
    assert listener.sequences() == [1]
    ring.write_exit(ExitReason.EXCEPTION, "RuntimeError: boom")
    steps, goodbye = listener.ask()
    assert list(steps.steps.flags) == [pb.INCOMPLETE]
    assert goodbye.exit.reason == pb.ExitReason.EXCEPTION
    assert (goodbye.exit.detail, goodbye.exit.last_sequence) == ("RuntimeError: boom", 2)


def test_a_rank_without_steps_shows_that_it_is_alive(ring: Ring) -> None:
    listener = Listener(ring).greet()
    (batch,) = listener.batches()
    assert batch.first_sequence == 1 and not batch.step
    assert listener.batches(after=0.9) == []
    assert len(listener.batches(after=0.1)) == 1


def test_records_go_when_due_or_when_a_batch_is_full(ring: Ring) -> None:
    listener = Listener(ring).greet()
    listener.ask()
    for sequence in range(1, 6):
        step(ring, sequence)
    assert listener.sequences(after=0.1) == []
    assert listener.sequences(limit=3) == [1, 2, 3]
    assert listener.sequences(limit=3) == []
    assert listener.sequences(after=1.0, limit=3) == [4, 5]


BAD_ROWS = [
    {"global_norm": math.nan}, {"global_norm": math.inf}, {"local_norm": math.inf}, {"loss": math.inf},
    {"global_nan_parameters": 1.0}, {"local_inf_parameters": 2.0}, {"global_norm": 10.0},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ROWS, ids=str)
def test_trouble_goes_at_once_but_only_its_beginning(ring: Ring, bad: dict[str, float]) -> None:
    step(ring, 1, global_norm=2.0)
    listener = Listener(ring).greet()
    assert listener.sequences() == [1]
    step(ring, 2, global_norm=5.0)
    assert listener.sequences() == []
    step(ring, 3, **bad)
    assert listener.sequences() == [2, 3]
    if bad != {"global_norm": 10.0}:
        step(ring, 4, **bad)
        assert listener.sequences() == []


def test_a_goodbye_goes_at_once_and_only_once(ring: Ring) -> None:
    listener = Listener(ring).greet()
    listener.ask()
    step(ring, 1)
    ring.write_exit(ExitReason.FINISHED)
    assert kinds(listener.ask()) == ["steps", "exit"]
    assert listener.ask(after=10.0) == []
    listener.store(1, closed=True)
    assert listener.rank.delivered and ring.acknowledged == 1 and ring.exit_acknowledged


def test_a_living_rank_cannot_be_closed(ring: Ring) -> None:
    listener = Listener(ring).greet()
    step(ring, 1)
    listener.store(1, closed=True)
    assert not listener.rank.delivered and not ring.exit_acknowledged


def test_after_a_new_stream_all_goes_again_from_what_is_stored(ring: Ring) -> None:
    listener = Listener(ring).greet()
    for sequence in range(1, 11):
        step(ring, sequence)
    assert listener.sequences() == list(range(1, 11))
    listener.store(4)
    listener.rank.restart_stream()
    assert kinds(listener.ask()) == ["hello"]
    listener.store(4)
    assert listener.sequences() == list(range(5, 11))


def test_another_database_gets_all_that_the_ring_still_holds(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, slots=8)
    listener = Listener(ring).greet()
    for sequence in range(1, 21):
        step(ring, sequence)
        listener.ask(after=1.0)
        listener.store(sequence)
    listener.rank.restart_stream()
    listener.greet(position=0)
    assert listener.sequences() == list(range(13, 21))
    assert ring.acknowledged == 0


def test_a_recorder_that_comes_later_goes_on_where_the_last_one_was(ring: Ring) -> None:
    first = Listener(ring).greet()
    for sequence in range(1, 6):
        step(ring, sequence)
    first.ask()
    first.store(3)
    second = Listener(ring)
    assert second.rank.unacknowledged == 2
    assert second.greet(position=3).sequences() == [4, 5]


def test_what_is_overrun_is_skipped_and_a_batch_has_no_gap(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, slots=8)
    listener = Listener(ring).greet()
    for sequence in range(1, 4):
        step(ring, sequence)
    assert listener.sequences(limit=2) == [1, 2]
    for sequence in range(4, 31):
        step(ring, sequence)
    assert listener.sequences(after=1.0) == list(range(23, 31))


def test_a_number_never_used_splits_the_batch(ring: Ring) -> None:
    for sequence in (1, 2, 4, 5):
        step(ring, sequence)
    listener = Listener(ring).greet()
    assert listener.sequences() == [1, 2]
    assert listener.sequences(after=1.0) == [4, 5]


def test_no_more_is_under_way_than_is_bounded(tmp_path: Path) -> None:
    ring = make_ring(tmp_path, slots=5000)
    for sequence in range(1, 5001):
        step(ring, sequence)
    listener = Listener(ring).greet()
    sent = [n for _ in range(20) for n in listener.sequences(after=1.0)]
    assert sent == list(range(1, 4097))
    listener.store(4096)
    assert listener.sequences(after=1.0)[0] == 4097


def test_a_batch_of_many_layers_is_small_enough_for_a_collector(tmp_path: Path) -> None:
    layers = [f"layer{i}" for i in range(2000)]
    ring = Ring.create(tmp_path / "many.ring", identity(model={"layers": layers}), layers=len(layers))
    for sequence in range(1, 65):
        begin(ring, sequence)
        ring.write_measured(sequence, [0.0] * ring.layout.columns)
    listener = Listener(ring).greet()
    sizes = [m.ByteSize() for _ in range(3) for m in listener.ask(after=1.0) if m.HasField("steps")]
    assert max(sizes) < 2 * 2**20 and len(sizes) > 1


def test_an_error_of_the_probe_is_an_event_with_its_text_and_is_counted(ring: Ring) -> None:
    step(ring, 1)
    ring.count_dropped("probe_error")
    ring.write_error("KeyError: 'momentum'")
    listener = Listener(ring)
    hello, event = listener.ask()
    assert hello.HasField("hello")
    assert (event.event.kind, event.event.step) == (pb.Event.PROBE_ERROR, 101)
    assert event.event.detail == "KeyError: 'momentum'"
    listener.store(0)
    (batch,) = listener.batches()
    assert dict(batch.dropped) == {"probe_error": 1}


def test_errors_on_every_step_do_not_make_more_events_than_batches(ring: Ring) -> None:
    listener = Listener(ring).greet()
    events = 0
    for _ in range(40):
        ring.count_dropped("probe_error")
        events += kinds(listener.ask(after=0.05)).count("event")
    assert 2 <= events <= 3


def test_drops_counted_at_the_very_end_still_go_out(ring: Ring) -> None:
    listener = Listener(ring).greet()
    listener.ask()
    ring.count_dropped("probe_error")
    ring.write_exit(ExitReason.FINISHED)
    messages = listener.ask()
    assert kinds(messages)[-2:] == ["steps", "exit"]
    assert dict(messages[-2].steps.dropped) == {"probe_error": 1}


def test_an_identity_that_is_none_is_refused(tmp_path: Path) -> None:
    for name, said in {"empty": {}, "wrong": identity(node=7), "odd": identity(model={"color": 1})}.items():
        ring = Ring.create(tmp_path / f"{name}.ring", said, layers=0)
        with pytest.raises(ValueError, match="has no valid identity"):
            Rank(ring.path)
