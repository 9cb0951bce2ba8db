"""What the metrics writer puts into metrics.jsonl and hands to TensorBoard."""

from __future__ import annotations

from pathlib import Path

from m2mkd_ds.logs import MetricsWriter, read_metrics


class Board:
    """Takes down what TensorBoard's SummaryWriter would be told."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        """Nothing to flush."""


def test_router_metrics_reach_the_file_whole_and_the_board_one_by_one(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", resume_step=0)
    writer._board = board = Board()
    record = {"step": 3, "moe/0/load": [0.75, 0.25], "moe/0/drop_rate": 0.125, "moe/0/dead": 0.0, "note": "x"}
    writer.write(record)
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]
    assert board.scalars == [("moe/0/load/0", 0.75, 3), ("moe/0/load/1", 0.25, 3), ("moe/0/drop_rate", 0.125, 3), ("moe/0/dead", 0.0, 3)]
