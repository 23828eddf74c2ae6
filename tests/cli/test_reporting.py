"""The table that pretrain and finetune print at their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.cli.reporting import Report, print_report
from minilora.training.loop import Result


def test_print_report_has_the_losses_with_their_unit_and_step(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"step": 0, "tokens": 30, "seconds": 2.0}\n{"step": 1, "tokens": 30, "seconds": 1.0}\n'
    )
    result = Result([3.0, 2.0], [(0, 3.5), (1, 1.5), (2, 2.5)], seconds=4.0, step=1)
    print_report(Report("finetune", tmp_path, result, bytes_per_token=1.0, trained=1234))
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert table["training loss, first"] == ["3.0000 nats per token", "0"]
    assert table["training loss, mean of the last 2"] == ["2.5000 nats per token", "1"]
    assert table["held-out loss, first"] == ["3.5000 nats per token", "0"]
    assert table["held-out loss, best"] == ["1.5000 nats per token", "1"]
    assert table["held-out loss, last"] == ["2.5000 nats per token", "2"]
    assert table["weights saved"] == ["1"]
    assert table["tokens per second"] == ["20"]
    assert table["trained parameters"] == ["1,234"]
    assert table["held-out bits per byte 5.049 -> 2.164 in 4 s"] == []
