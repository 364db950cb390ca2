"""What is generated and committed is what its generator writes today."""

from __future__ import annotations

from docs.make_metrics import PAGE, page


def test_the_page_of_series_is_what_the_catalogue_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make docs"
