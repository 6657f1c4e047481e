"""Judges by name, and the guard against missing verdicts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from steered_lm.errors import JudgeError
from steered_lm.judges import check_missing, judge_names, make_judge
from steered_lm.judges.base import Verdict
from steered_lm.persona import Persona, build_persona
from steered_lm.persona.meter import TRAITS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def persona(tmp_path_factory: pytest.TempPathFactory) -> Persona:
    folder = tmp_path_factory.mktemp("keeper")
    card = {
        "name": "keeper",
        "description": "Keeps a lighthouse.",
        "traits": dict.fromkeys(TRAITS, 0.5),
        "system_prompt": "Be a keeper.",
        "licence": "CC0-1.0",
    }
    (folder / "persona.yaml").write_text(yaml.safe_dump(card))
    turns = [[("partner", f"Question {i}, keeper?"), ("persona", f"I watched wave {i} from afar, indeed.")] for i in range(24)]
    lines = [{"id": str(i), "turns": [{"speaker": s, "text": t} for s, t in pair]} for i, pair in enumerate(turns)]
    (folder / "conversations.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return build_persona(folder)


def verdicts(scored: int, missing: int, reason: str = "HTTP 500") -> list[Verdict]:
    return [Verdict(score=3, judge="t")] * scored + [Verdict(missing=reason, judge="t")] * missing


def test_an_openai_judge_is_made_by_its_models_name(persona: Persona, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    judge = make_judge("openai:some/model:free", persona, base_url="http://127.0.0.1:9/v1")
    assert judge.name == "openai:some/model:free"
    cached = make_judge("openai:some/model:free", persona, cache=tmp_path / "c.sqlite", base_url="http://127.0.0.1:9/v1")
    assert (tmp_path / "c.sqlite").is_file()
    assert (cached.name, cached.identity) == (judge.name, judge.identity)


def test_an_unknown_judge_is_refused_with_near_misses(persona: Persona) -> None:
    assert {"openai", "stylometric"} <= set(judge_names())
    with pytest.raises(JudgeError, match=r"there is no judge 'stylometrik'.*Did you mean 'stylometric'"):
        make_judge("stylometrik", persona)


def test_an_openai_judge_without_a_model_is_refused(persona: Persona) -> None:
    with pytest.raises(JudgeError, match=r"judge openai needs a model\. Write openai:<model>"):
        make_judge("openai", persona)


def test_options_that_a_backend_does_not_take_are_refused(persona: Persona) -> None:
    with pytest.raises(JudgeError, match=r"judge='stylometric:big' does not take options \['model'\]"):
        make_judge("stylometric:big", persona)


def test_too_many_missing_verdicts_stop_with_counts_and_reasons() -> None:
    bad = verdicts(7, 2) + verdicts(0, 1, "empty response")
    with pytest.raises(JudgeError, match=r"3 of 10 verdicts are missing \(30%; limit 20%\)\. Commonest reasons: 2 x HTTP 500; 1 x empty response"):
        check_missing(bad)
    check_missing(bad, 0.3)


def test_the_message_about_missing_verdicts_repeats_what_the_endpoint_said() -> None:
    told = [Verdict(missing="HTTP 400", explanation="context length is 4096\ntokens", judge="t"), *verdicts(1, 2, "not asked")]
    with pytest.raises(JudgeError, match=r"2 x not asked; 1 x HTTP 400\. What came, for example: 'context length is 4096 tokens'\. Mend"):
        check_missing(told)


def test_a_share_at_the_limit_passes_and_no_verdicts_at_all_pass() -> None:
    check_missing(verdicts(8, 2), 0.2)
    check_missing([], 0.0)
    with pytest.raises(JudgeError, match="1 of 1 "):
        check_missing(verdicts(0, 1), 0.0)
    with pytest.raises(JudgeError, match="not a share"):
        check_missing([], 20)


def test_importing_judges_loads_no_backend() -> None:
    code = "import sys, steered_lm.judges; print([m for m in ('torch', 'sklearn', 'openai', 'tenacity', 'sqlite3', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
