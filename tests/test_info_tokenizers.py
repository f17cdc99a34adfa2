"""``mambax info`` of checkpoints whose tokenizer is another than the model's own, as transformers writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_cases
import pytest
from typer.testing import CliRunner

from mambax.cli.app import app

PLAIN = [name for name in sorted(family_cases.CASES) if "-" not in name]


JSON = "tokenizer.json"


def characters(count: int) -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE({chr(0x4E00 + i): i for i in range(count)}, []))


def words() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"to": 0, "be": 1, "[UNK]": 2}, unk_token="[UNK]"))


def fast(backend: Any, **options: Any) -> Any:
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def slow() -> Any:
    import transformers

    return transformers.ByT5Tokenizer(extra_ids=0)


TOKENIZERS: dict[str, tuple[Callable[[], Any] | None, str, str | None]] = {
    "none": (None, "none here", None),
    "no tokenizer.json": (
        slow,
        "none here that mambax reads: expected tokenizer.json, found tokenizer_config.json",
        None,
    ),
    "words": (lambda: fast(words(), unk_token="[UNK]"), "3 tokens, unk '[UNK]'", "none"),
    "template": (lambda: fast(characters(60), eos_token="<end>", chat_template="{{ 1 }}"), "61 tokens, eos", "yes"),
    "too large": (lambda: fast(characters(500)), "500 tokens, more than the 1", "none"),
}
"""Name -> what makes it, and what is said of it and of its chat template."""


@pytest.mark.parametrize("family", PLAIN)
def test_any_tokenizer_beside_any_family(family: str, tmp_path: Path) -> None:
    family_cases.write(family, tmp_path)
    for name, (make, expected, template) in TOKENIZERS.items():
        for path in [*tmp_path.glob("*token*"), *tmp_path.glob("chat_template*")]:
            path.unlink()
        if make is not None:
            make().save_pretrained(tmp_path)
        result = CliRunner().invoke(app, ["info", str(tmp_path)])
        assert result.exit_code == 0, (name, result.output)
        pairs = (line.partition("  ") for line in result.output.splitlines())
        rows = {label.strip(): value.strip() for label, _, value in pairs}
        assert rows["tokenizer"].startswith(expected), name
        assert rows.get("chat template") == template, name
