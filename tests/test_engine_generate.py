import random
import threading
from collections import Counter

import pytest
import torch
import transformers as hf
from chat_folder import save_chat_model
from tiny_models import FAMILIES, SPECIAL_FAMILIES, generated_alone, random_model, spec_for, special_model, steering_kinds

from steered_lm.engine import Engine, GenerationRow, Sampling, generation_plan
from steered_lm.engine.cache import EngineCache
from steered_lm.engine.plain import generate_plain
from steered_lm.engine.stops import Stops
from steered_lm.steering.hooks import Steerer
from steered_lm.steering.spec import SteeringSpec

DRAW = random.Random(0)
UNEQUAL = [tuple(DRAW.randrange(3, 64) for _ in range(length)) for length in (1, 1, 2, 5, 14, 23)]
COMMON = tuple(DRAW.randrange(3, 64) for _ in range(11))
BEGIN_ALIKE = [COMMON + tuple(DRAW.randrange(3, 64) for _ in range(length)) for length in (1, 1, 2, 5, 9)]
ENDS = (3, 9, 17, 30, 41, 58)
LENGTHS = (1, 2, 4, 7, 11)
SAMPLINGS = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=1.0, seed=2),
    Sampling(temperature=0.7, top_k=5, seed=3),
    Sampling(temperature=1.3, top_p=0.8, seed=4),
    Sampling(temperature=1.5, min_p=0.1, repetition_penalty=1.2, seed=5),
    Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.05, seed=6),
    Sampling(),
]


def engine(steerer, **settings):
    return Engine(steerer, None, **{"gemm": "torch", **settings})


def mixed_rows(prompts, kinds):
    """24 rows in which prompts, specs, lengths and penalties meet in many ways, some of them twice."""
    penalties = [Sampling(), Sampling(), Sampling(), Sampling(repetition_penalty=1.3)]
    rows = [GenerationRow(prompts[i % len(prompts)], LENGTHS[i % 5], kinds[(5 * i) % len(kinds)], penalties[i % 4]) for i in range(20)]
    return [*rows, rows[4], rows[4], rows[11], rows[8]]


def one_by_one(steerer, rows, end_ids=()):
    return [generated_alone(steerer, row, end_ids) for row in rows]


def expected_row_steps(rows, found):
    """A row's first token comes from its prompt, each further one from a step; rows that are alike run once."""
    alike = {(row._replace(spec=None), row.spec and row.spec.digest): result for row, result in zip(rows, found, strict=True)}
    return sum(len(result.tokens) - 1 for result in alike.values())


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL_FAMILIES])
def test_a_mixed_population_equals_one_row_at_a_time(family, tmp_path):
    model = special_model(family)
    rows = mixed_rows(UNEQUAL, steering_kinds(model, tmp_path))
    steerer = Steerer(model)
    alone = one_by_one(steerer, rows)
    assert len(set(alone)) >= 12
    for most in (None, 3):
        run = engine(steerer, max_rows=most)
        found = run.generate(rows)
        assert [result.tokens for result in found] == alone, most
        assert {result.ended for result in found} == {"length"}
        if run.support.generation is None:
            assert run.report.row_steps == expected_row_steps(rows, found)


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL_FAMILIES])
def test_rows_whose_prompts_begin_alike_and_that_end_at_different_times_equal_one_row_at_a_time(family, tmp_path):
    model = special_model(family)
    kinds = steering_kinds(model, tmp_path)
    rows = [GenerationRow(BEGIN_ALIKE[i % 5], 9, kind) for i, kind in enumerate(kinds)]
    steerer = Steerer(model)
    alone = one_by_one(steerer, rows, ENDS)
    for most in (None, 7):
        found = engine(steerer, end_ids=ENDS, max_rows=most).generate(rows)
        assert [result.tokens for result in found] == alone, most
        assert [result.ended for result in found] == ["stop" if tokens[-1] in ENDS else "length" for tokens in alone]


SHARING = ("llama", "qwen2", "qwen3", "phi3", "gpt_neox", "gpt2", "opt", "mixtral")


@pytest.mark.parametrize("prompts", [UNEQUAL[2:], BEGIN_ALIKE[1:]], ids=["unequal", "begin alike"])
@pytest.mark.parametrize("family", SHARING)
def test_rows_that_read_one_copy_of_their_prompt_equal_one_row_at_a_time(family, prompts, tmp_path):
    model = special_model(family)
    kinds = [kind for kind in steering_kinds(model, tmp_path) if kind is None or (kind.positions == "response" and not kind.sites)]
    rows = mixed_rows(prompts, kinds)
    steerer = Steerer(model)
    alone = one_by_one(steerer, rows)
    for most in (None, 3, 7):
        run = engine(steerer, max_rows=most)
        found = run.generate(rows)
        assert run.support.sharing
        assert [result.tokens for result in found] == alone, most
        # the last prompt token is a row's first step
        distinct = len({(row._replace(spec=None), row.spec and row.spec.digest) for row in rows})
        assert run.report.row_steps == expected_row_steps(rows, found) + distinct


def test_prompts_of_one_token_leave_nothing_to_share(tmp_path):
    model = random_model()
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    rows = [GenerationRow(prompt, 6, kind) for prompt in UNEQUAL[:3] for kind in (kinds[0], kinds[1], kinds[4], kinds[8])]
    assert [result.tokens for result in engine(steerer).generate(rows)] == one_by_one(steerer, rows)


def test_engines_in_different_threads_read_their_own_prompts():
    models = {name: random_model() for name in ("first", "second")}
    rows = [GenerationRow((5, 6, 7, 8 + i % 2), 6, None, Sampling(temperature=1.0, seed=i)) for i in range(8)]
    expected = engine(Steerer(models["first"])).generate(rows)
    inside, found = {name: threading.Event() for name in ("first", "second", "end")}, {}

    def work(name, other, until):
        run = engine(Steerer(models[name]))
        assert run.support.sharing

        def wait(module, args, kwargs):
            # in a step: not before both are in one, and the second does not go on before the first has come to its end
            if len(args[0]) == len(rows):
                inside[name].set()
                assert all(inside[event].wait(30) for event in (other, *until))

        models[name].model.layers[1].register_forward_pre_hook(wait, with_kwargs=True)
        found[name] = run.generate(rows)

    def first():
        work("first", "second", ())
        inside["end"].set()

    threads = [threading.Thread(target=first), threading.Thread(target=work, args=("second", "first", ("end",)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"first": expected, "second": expected}


def test_a_population_larger_than_the_batch_is_refilled_and_the_cache_moved_back(tmp_path, monkeypatch):
    moves = Counter()

    def counted(name, real):
        def run(self, *args):
            moves[name] += name != "move" or bool(args[0])
            return real(self, *args)

        return run

    for name in ("rebase", "admit", "move"):
        monkeypatch.setattr(EngineCache, name, counted(name, getattr(EngineCache, name)))
    monkeypatch.setattr(generation_plan, "_SLACK", 1)
    model = random_model()
    rows = mixed_rows(UNEQUAL, steering_kinds(model, tmp_path)) * 2
    rows = [row._replace(tokens=(*row.tokens, number + 3)) for number, row in enumerate(rows)]
    steerer = Steerer(model)
    run = engine(steerer, max_rows=4)
    found = run.generate(rows)
    assert [result.tokens for result in found] == one_by_one(steerer, rows)
    assert run.report.row_steps == expected_row_steps(rows, found)
    # waiting rows take the places of those that end: the batch stays full until the last rows
    assert run.report.row_steps / 4 <= run.report.steps <= run.report.row_steps / 4 + max(LENGTHS)
    assert moves["rebase"] >= 2
    assert moves["admit"] >= 8
    assert moves["move"] >= 4


def test_rows_that_end_leave_the_batch(tmp_path):
    model = random_model()
    rows = [GenerationRow((5, 6, token), 40, spec_for(model, tmp_path)) for token in range(3, 23)]
    steerer = Steerer(model)
    run = engine(steerer, end_ids=ENDS)
    found = run.generate(rows)
    lengths = [len(result.tokens) for result in found]
    assert [result.tokens for result in found] == one_by_one(steerer, rows, ENDS)
    assert len(set(lengths)) >= 5
    assert run.report.steps == max(lengths) - 1
    assert run.report.row_steps == sum(lengths) - len(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_one_prompt_under_many_specs_and_many_prompts_under_one_spec_equal_one_row_at_a_time(family, tmp_path):
    model = special_model(family)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    fixed = [GenerationRow(UNEQUAL[4], 6, kind) for kind in kinds]
    single = [GenerationRow((7,), 6, kind) for kind in kinds]
    varied = [[GenerationRow(prompt, 6, kind) for prompt in UNEQUAL + BEGIN_ALIKE] for kind in (kinds[1], kinds[3], kinds[10], None)]
    for rows in (fixed, single, *varied):
        assert [result.tokens for result in engine(steerer).generate(rows)] == one_by_one(steerer, rows)


def test_specs_of_one_kind_only_equal_one_row_at_a_time(tmp_path):
    model = random_model()
    steerer = Steerer(model)
    for kind in steering_kinds(model, tmp_path):
        rows = [GenerationRow(prompt, 5, kind) for prompt in (*BEGIN_ALIKE, BEGIN_ALIKE[0])]
        assert [result.tokens for result in engine(steerer).generate(rows)] == one_by_one(steerer, rows)


def test_one_row_gives_one_result_and_no_rows_give_none(tmp_path):
    model = random_model()
    steerer = Steerer(model)
    run = engine(steerer)
    row = GenerationRow((5, 6, 7), 4, spec_for(model, tmp_path))
    assert run.generate([]) == []
    assert run.report.steps == 0
    assert [result.tokens for result in run.generate([row])] == [generated_alone(steerer, row)]


def test_weight_zero_gives_the_unsteered_text(tmp_path):
    model = random_model()
    spec = spec_for(model, tmp_path)
    run = engine(Steerer(model))
    zero, plain, steered = run.generate([GenerationRow((5, 6, 7), 9, kind) for kind in (spec.with_weights({"formality": 0.0}), None, spec)])
    assert zero == plain != steered


@pytest.mark.parametrize("most", [None, 3])
def test_results_are_told_once_each_and_come_back_in_order(most, tmp_path):
    model = random_model()
    rows = mixed_rows(UNEQUAL, steering_kinds(model, tmp_path))
    told = []
    found = engine(Steerer(model), max_rows=most, end_ids=ENDS).generate(rows, lambda number, result: told.append((number, result)))
    assert sorted(number for number, _ in told) == list(range(len(rows)))
    assert all(found[number] == result for number, result in told)
    assert [number for number, _ in told] != sorted(number for number, _ in told)


def test_an_empty_prompt_and_nothing_to_generate_are_refused():
    run = engine(Steerer(random_model()))
    with pytest.raises(ValueError, match="row 1 has 0 prompt tokens and max_new_tokens=3; both must be 1 or more"):
        run.generate([GenerationRow((5,), 3), GenerationRow((), 3)])
    with pytest.raises(ValueError, match="row 0 has 1 prompt tokens and max_new_tokens=0"):
        run.generate([GenerationRow((5,), 0)])


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = save_chat_model(tmp_path_factory.mktemp("chat"))
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, hf.AutoTokenizer.from_pretrained(folder)


def test_stop_strings_end_each_row_at_the_first_token_that_completes_one(chat, tmp_path):
    model, tokenizer = chat
    kinds = steering_kinds(model, tmp_path)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in ("the quick brown fox", "my sister", "Pack twelve BIG jugs? Yes!")]
    free = [GenerationRow(prompts[i % 3], 30, kinds[i % 12]) for i in range(24)]
    steerer = Steerer(model)
    texts = [generated_alone(steerer, row, top_p=None, temperature=None) for row in free]
    stops = [(), ("e",), ("qu", "s "), ("no such text",), ("<|user|>", "<|end|>")]
    rows, expected = [], []
    for number, (row, tokens) in enumerate(zip(free, texts, strict=True)):
        # what its own text holds, cut out of the middle, so that it spans tokens
        own = tokenizer.decode(tokens)[7:10]
        stop = (own, *stops[number % 5]) if number % 2 else stops[number % 5]
        rows.append(row._replace(stop=stop))
        ends = (length for length in range(1, 31) if any(text in tokenizer.decode(tokens[:length]) for text in stop))
        expected.append(tokens[: next(ends, 30)])
    found = Engine(steerer, tokenizer, max_rows=5, gemm="torch").generate(rows)
    assert [result.tokens for result in found] == expected
    lengths = Counter(len(tokens) for tokens in expected)
    assert len(lengths) >= 6 and lengths[30] >= 3
    assert all((result.ended == "stop") == (len(tokens) < 30) for result, tokens in zip(found, expected, strict=True) if len(tokens) < 30)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt"])
def test_a_sampled_row_is_the_same_alone_and_in_any_company(family, tmp_path):
    model = special_model(family)
    kinds, steerer = steering_kinds(model, tmp_path), Steerer(model)
    rows = [GenerationRow(UNEQUAL[i % 6], 12, kinds[i % 12], SAMPLINGS[i % 7]) for i in range(24)]
    before = torch.get_rng_state()
    together = engine(steerer).generate(rows)
    assert engine(steerer, max_rows=5).generate(rows[::-1])[::-1] == together
    assert [engine(steerer).generate([row])[0] for row in rows] == together
    alone = {}
    for number, row in enumerate(rows):
        generate_plain(steerer, [row], Stops(None, ()), 1, lambda _, result, number=number: alone.update({number: result}))
    assert [alone[number] for number in range(24)] == together
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_alone_decides_what_is_sampled():
    run = engine(Steerer(random_model()))
    row = GenerationRow((5, 6, 7), 12, None, Sampling(temperature=1.0))
    texts = [result.tokens for result in run.generate([row._replace(sampling=row.sampling._replace(seed=seed)) for seed in (*range(8), 3)])]
    assert len(set(texts)) == 8
    assert texts[8] == texts[3]


def overflowing(spec, alpha):
    return SteeringSpec.model_validate({**spec.model_dump(), "operation": "ablate", "alpha": alpha, "layers": (0,), "positions": "response"})


@pytest.mark.parametrize("most", [3, 24])
@pytest.mark.parametrize("shared", [False, True])
def test_a_row_whose_steering_overflows_ends_with_nan_and_harms_no_other(shared, most, tmp_path):
    model = random_model()
    spec, kinds, steerer = spec_for(model, tmp_path), steering_kinds(model, tmp_path), Steerer(model)
    kinds, lead = (kinds[:2] + kinds[8:10], (5,)) if shared else (kinds, ())
    # the projection times alpha passes float32's range only for some tokens, so that rows break after a few steps
    wild = [GenerationRow((*lead, 24 + seed % 15), 25, overflowing(spec, 3.3e38), Sampling(temperature=1.0, seed=seed)) for seed in range(20)]
    first = [GenerationRow((5, 6, 3 + i % 5), 22 - i // 5, kinds[i % len(kinds)]) for i in range(20)]
    later = [GenerationRow((*lead, 40 + i % 10), 4 + i % 15, kinds[i % len(kinds)]) for i in range(40)]
    # of 24 places the broken rows hold the last; rows that take them over are younger than the rows beside them
    run = engine(steerer, max_rows=most)
    found = run.generate([*first, *wild, *later])
    tame = found[:20] + found[40:]
    assert [result.ended for result in tame] == ["length"] * 60
    assert [result.tokens for result in tame] == one_by_one(steerer, first + later)
    broken = [result for result in found[20:40] if result.ended == "nan"]
    assert len(broken) >= 10
    assert len({len(result.tokens) for result in broken}) >= 5
    assert found[20:40] == [engine(steerer).generate([row])[0] for row in wild]
    assert run.report.row_steps == sum(len(result.tokens) for result in found) - (0 if shared else 80)
