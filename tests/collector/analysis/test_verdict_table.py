"""The table of verdicts: complete, consistent, and the only place that words a verdict."""

from __future__ import annotations

import re
from collections import Counter
from typing import get_args

import pytest

from foreshock_collector.analysis.verdict_entry import Wording
from foreshock_collector.analysis.verdict_table import VERDICT_TABLE, Cause
from foreshock_collector.analysis.verdicts import make_verdict
from foreshock_collector.web.answers import verdict_answer
from tests.support.repository import ROOT

WORDINGS: list[tuple[Cause, str, Wording]] = [
    (cause, name, wording)
    for cause, entry in VERDICT_TABLE.items()
    for name, wording in (("", entry), *entry.variants.items())
]
STATIC = ROOT / "collector/foreshock_collector/web/static"


class Anything(dict[str, object]):
    """Has a value for every name: a number where a template formats one."""

    def __missing__(self, name: str) -> object:
        return 1.0 if name in {"usual", "peak", "loss_scale", "seconds"} else "X"


@pytest.mark.parametrize(("cause", "variant", "wording"), WORDINGS)
def test_a_wording_is_a_sentence_and_a_list_of_things_to_try(cause: Cause, variant: str, wording: Wording) -> None:
    assert re.fullmatch(r"[A-Z{].*\.", wording.summary.format_map(Anything()))
    assert 0 < wording.confidence <= 1
    for line in (*wording.advice, *wording.alternatives):
        text = line.format_map(Anything())
        assert text[0].islower() or text.startswith("ReLU"), text
        assert not text.endswith("."), text
    # An explosion's advice follows from its likely root; nothing needs to be done for a healthy run.
    assert bool(wording.advice) == (cause not in ("healthy", "exploding_gradients"))


def test_every_cause_has_one_entry_and_a_title_of_its_own() -> None:
    assert set(get_args(Cause)) == VERDICT_TABLE.keys()
    titles = Counter(entry.title for entry in VERDICT_TABLE.values())
    assert set(titles.values()) == {1}
    assert all(re.fullmatch(r"[A-Z][a-z ,]+", title) for title in titles)


def test_the_runbook_of_a_verdict_explains_it_by_name() -> None:
    for cause, entry in VERDICT_TABLE.items():
        if runbook := entry.outcome.alert:
            text = (ROOT / f"docs/runbooks/{runbook}.md").read_text()
            assert f"`{cause}`" in text or runbook in ("ForeshockExplodingGradients", "ForeshockRunStalled"), cause


def test_the_page_takes_titles_from_the_api() -> None:
    scripts = "".join(script.read_text() for script in STATIC.glob("*.js"))
    assert "verdict.title" in scripts
    assert [entry.title for entry in VERDICT_TABLE.values() if f'"{entry.title}"' in scripts] == []


def test_a_verdict_brings_what_the_table_says_of_its_cause() -> None:
    verdict = make_verdict("duplicate_data", attempt=1, step=20, evidence=("seen",))
    answer, entry = verdict_answer(verdict), VERDICT_TABLE["duplicate_data"]
    assert (answer["title"], answer["runbook"]) == (entry.title, entry.outcome.alert)
    assert (answer["finite"], answer["names_last_step"]) == (True, False)
    assert (answer["summary"], answer["first_bad_step"]) == (entry.summary.format(step=20), 20)
    assert answer["try"] == entry.advice
    rank = make_verdict("bad_rank", attempt=1, step=3, rank=2, evidence=())
    assert "step 3 on rank 2" in rank.try_[-1]
