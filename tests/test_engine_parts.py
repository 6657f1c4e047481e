import random
import weakref
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
import transformers as hf
from scipy.stats import chisquare
from tiny_models import FAMILIES, random_model, spec_for, special_model, steering_kinds
from transformers.cache_utils import DynamicCache

from steered_lm.engine import Engine, GenerationRow, Sampling, ScoreRequest, engine, tree
from steered_lm.engine.cache import EngineCache
from steered_lm.engine.forward import Forward
from steered_lm.engine.generation_plan import Demand, fit_generation
from steered_lm.engine.memory import Footprint
from steered_lm.engine.sampling import Sampler, draw
from steered_lm.engine.scoring_plan import beginning_bytes, fit_scoring, pass_bytes
from steered_lm.engine.stops import Stops
from steered_lm.engine.tree import build_contexts, group_by_prefix
from steered_lm.errors import ModelError
from steered_lm.steering.hooks import Steerer

# -- sampling ---------------------------------------------------------------------------------------------------------------------

SETTINGS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in product((0.6, 1.0, 1.7), (0, 1, 5, 50), (1.0, 0.85, 0.3), (0.0, 0.08))
]


def warped(logits, sampling):
    """Probabilities by transformers' own warpers, in the order of its ``generate``."""
    steps = [hf.TemperatureLogitsWarper(sampling.temperature)]
    steps += [hf.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [hf.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [hf.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    return hf.LogitsProcessorList(steps)(torch.zeros(len(logits), 1, dtype=torch.int64), logits.double()).softmax(dim=-1)


def test_draws_over_the_unit_interval_have_the_probabilities_of_transformers_warpers():
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) * 2
    grid = 2000
    points = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    for sampling in SETTINGS:
        expected = warped(logits, sampling)
        for row, probabilities in zip(logits, expected, strict=True):
            share = draw(row.expand(grid, -1), sampling, points).bincount(minlength=20) / grid
            # each token has an interval of its probability's length, in which so many points lie, one more or one less
            torch.testing.assert_close(share.double(), probabilities, atol=1 / grid, rtol=0)
            assert not share[probabilities == 0].any()


def test_each_token_that_transformers_warpers_keep_has_an_interval_of_its_own():
    logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(1)) * 3
    for sampling in SETTINGS:
        probabilities = warped(logits, sampling)
        order = torch.arange(40).expand(200, -1)
        size = probabilities.gather(1, order)
        middle = size.cumsum(dim=-1) - size / 2
        for rank in range(40):
            drawn = draw(logits, sampling, middle[:, rank].clamp(max=1 - 1e-12))
            wide = size[:, rank] > 1e-9
            assert torch.equal(drawn[wide], order[wide, rank])
            assert (probabilities.gather(1, drawn[:, None]) > 0).all()


def test_a_point_between_two_tokens_belongs_to_the_second():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().expand(6, -1)
    points = torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751, 0.999999], dtype=torch.float64)
    assert draw(logits, Sampling(temperature=1.0), points).tolist() == [0, 0, 1, 1, 2, 3]
    assert draw(logits, Sampling(temperature=1.0, top_k=2), points).tolist() == [0, 0, 0, 1, 1, 1]
    assert draw(logits, Sampling(temperature=1.0, top_p=0.8), points).tolist() == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("kept", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_rounding_that_swaps_two_nearly_equal_tokens_changes_no_draw(kept):
    logits = torch.tensor([[0.0, 2.0, 2.0 + 1e-6, -1.0], [0.0, 2.0 + 1e-6, 2.0, -1.0]])
    points = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    first, second = (draw(row.expand(100, -1), Sampling(temperature=1.0, **kept), points) for row in logits)
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("seeds", ["a seed a row", "one row for long"])
def test_seeded_draws_follow_the_distribution(seeds):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2))
    count = 4000
    if seeds == "a seed a row":
        rows = [GenerationRow((5,), 1, None, Sampling(temperature=0.9, seed=seed)) for seed in range(count)]
        drawn, _ = Sampler(rows, 12, logits.device).choose(logits.expand(count, -1), range(count))
    else:
        sampler = Sampler([GenerationRow((5,), count, None, Sampling(temperature=0.9, seed=7))], 12, logits.device)
        drawn = [sampler.choose(logits, [0])[0][0] for _ in range(count)]
    expected = (logits[0].double() / 0.9).softmax(dim=-1) * count
    assert chisquare(torch.tensor(drawn).bincount(minlength=12).numpy(), expected.numpy()).pvalue > 0.01


def test_the_repetition_penalty_is_that_of_transformers():
    generator = torch.Generator().manual_seed(3)
    for penalty in (0.7, 1.1, 2.5):
        rows = [GenerationRow(tuple(torch.randint(0, 30, (5,), generator=generator).tolist()), 9, None, Sampling(repetition_penalty=penalty))] * 40
        rows = [row._replace(tokens=(*row.tokens, i % 30)) for i, row in enumerate(rows)] + [GenerationRow((5,), 9)]
        sampler, texts = Sampler(rows, 30, torch.device("cpu")), [list(row.tokens) for row in rows]
        for step in range(9):
            # every other time all scores are negative
            logits = torch.randn(len(rows), 30, generator=generator) - 5 * (step % 2)
            before = logits.clone()
            chosen, broken = sampler.choose(logits, range(len(rows)))
            processor = hf.RepetitionPenaltyLogitsProcessor(penalty)
            expected = [int(processor(torch.tensor([text]), row[None]).argmax()) for text, row in zip(texts[:-1], before[:-1], strict=True)]
            assert chosen == [*expected, int(before[-1].argmax())]
            assert torch.equal(logits, before)
            assert not any(broken)
            for text, token in zip(texts, chosen, strict=True):
                text.append(token)


def test_a_row_with_a_score_that_is_nan_is_told_and_the_others_are_drawn_as_ever():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(4))
    bad = logits.clone()
    bad[1, 3], bad[2] = float("nan"), float("nan")
    rows = [GenerationRow((5,), 1, None, Sampling(temperature=1.0, seed=seed)) for seed in (1, 2)] + [GenerationRow((5,), 1)] * 2
    whole, _ = Sampler(rows, 9, logits.device).choose(logits, range(4))
    chosen, broken = Sampler(rows, 9, logits.device).choose(bad, range(4))
    assert broken == [False, True, True, False]
    assert (chosen[0], chosen[3]) == (whole[0], whole[3])


# -- stops ------------------------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes: the longest way to write a stop string."""

    def decode(self, tokens, **options):
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["…and they stopped. THE END: for now", "ends with ÄÖÜ€ and more", "\n\nUser: hi"])
def test_a_stop_string_is_seen_however_many_tokens_it_takes(text):
    stops = Stops(Bytes(), ())
    written = list(text.encode())
    for stop in ("THE END:", "ÄÖÜ€", "\n\nUser:"):
        row = GenerationRow((5,), 1000, None, Sampling(), ("nowhere", stop))
        expected = next((n for n in range(1, len(written) + 1) if stop in Bytes().decode(written[:n])), None)
        assert next((n for n in range(1, len(written) + 1) if stops.ended(row, written[:n]) == "stop"), None) == expected


def test_an_end_token_outranks_the_length_and_a_row_without_either_goes_on():
    stops = Stops(None, (7, 8))
    row = GenerationRow((5,), 3)
    assert [stops.ended(row, tokens) for tokens in ([1], [7], [1, 2], [1, 2, 8], [1, 2, 3])] == [None, "stop", None, "stop", "length"]


# -- groups of contexts -----------------------------------------------------------------------------------------------------------


def common(contexts):
    limit = min(map(len, contexts)) - 1
    return next((i for i in range(limit) if len({context[i] for context in contexts}) > 1), limit)


def saving(size, prefix):
    """Tokens that are saved by running a common beginning once, less what its own pass costs."""
    return (size - 1) * prefix - tree._WORTH if prefix >= tree._SHORTEST else 0


def best_saving(contexts):
    """Most that can be saved by groups of all contexts that go on after some beginning, found by trying every choice of disjoint groups."""
    members = {}
    for prefix in sorted({context[:length] for context in contexts for length in range(1, len(context))}, key=len):
        going_on = frozenset(i for i, context in enumerate(contexts) if len(context) > len(prefix) and context[: len(prefix)] == prefix)
        members[going_on] = len(prefix)

    def best(left):
        if not left:
            return 0
        (group, prefix), *rest = left
        return max(best(rest), saving(len(group), prefix) + best([other for other in rest if not other[0] & group]))

    return best([(group, prefix) for group, prefix in members.items() if saving(len(group), prefix) > 0])


def test_groups_hold_every_context_once_and_save_as_much_as_the_best_choice_of_beginnings(monkeypatch):
    monkeypatch.setattr(tree, "_WORTH", 3)
    monkeypatch.setattr(tree, "_SHORTEST", 2)
    rng = random.Random(0)
    kinds = set()
    stems = [(1, 1, 1, 1), (2, 2, 2, 2, 2), (1, 1, 2, 2, 2, 1), ()]
    for _ in range(300):
        contexts = [(*rng.choice(stems), *rng.choices((1, 1, 1, 2), k=rng.randrange(1, 6))) for _ in range(rng.randrange(1, 8))]
        groups = group_by_prefix(contexts)
        assert sorted(i for group in groups for i in group.contexts) == list(range(len(contexts)))
        for group in groups:
            members = [contexts[i] for i in group.contexts]
            if group.prefix:
                assert {member[: group.prefix] for member in members} == {members[0][: group.prefix]}
                assert all(len(member) > group.prefix for member in members)
                assert group.prefix >= 2 and len(members) > 1
                assert group.prefix == common(members)
        assert sum(saving(len(group.contexts), group.prefix) for group in groups if group.prefix) == best_saving(contexts)
        assert sum(group.prefix == 0 for group in groups) <= 1
        kinds.add((sum(group.prefix > 0 for group in groups), any(group.prefix == 0 for group in groups)))
    assert kinds >= {(0, True), (1, True), (1, False), (2, True), (2, False)}


def test_common_beginnings_are_left_alone_when_they_are_short_or_not_wanted():
    few_shot, primer = tuple(range(100, 170)), tuple(range(7))
    contexts = [(*few_shot, 1), (*few_shot, 2), (*primer, 1), *((*primer, 1, i) for i in range(50)), (9,)]
    groups = group_by_prefix(contexts)
    assert sorted((group.prefix, sorted(group.contexts)) for group in groups) == [(0, [2, 53]), (8, list(range(3, 53))), (70, [0, 1])]
    assert [group.prefix for group in group_by_prefix(contexts, share=False)] == [0]
    assert group_by_prefix([]) == []
    assert [(group.prefix, group.contexts) for group in group_by_prefix([few_shot])] == [(0, [0])]


def test_twenty_thousand_contexts_are_grouped_without_deep_recursion():
    shared = tuple(range(30))
    contexts = [(*shared, i, i) for i in range(10_000)] + [(i, *shared) for i in range(1000, 11_000)]
    random.Random(0).shuffle(contexts)
    groups = group_by_prefix(contexts)
    assert [(group.prefix, len(group.contexts)) for group in groups] == [(30, 10_000), (0, 10_000)]
    # ever longer common beginnings, so that the tree is as deep as there are contexts
    nested = [(*[0] * depth, 1) for depth in range(2500)]
    (group, *_), depths = group_by_prefix(nested), [common([a, b]) for a, b in pairwise(nested)]
    assert depths == list(range(2499))
    assert group.prefix * (len(group.contexts) - 1) == max(depth * (2499 - depth) for depth in range(2500))


def test_a_text_that_is_too_long_is_cut_at_its_beginning_and_meets_others_of_the_same_end():
    tail = tuple(range(10))
    requests = [
        ScoreRequest((99, *tail), (1, 2)),
        ScoreRequest((98, 97, *tail), (1, 2)),
        ScoreRequest(tail, (1, 2)),
        ScoreRequest((99, *tail), (1, 2), response_start=4),
        ScoreRequest((99, *tail), (1,)),
    ]
    contexts, places = build_contexts(requests, [0, 0, 1, 0, 0], max_length=10)
    assert [(context.key.tokens, context.key.split, context.key.ordinary) for context in contexts] == [
        (tail[1:], 8, True),
        (tail[1:], 1, False),
        (tail, 9, True),
    ]
    assert [tuple(place) for place in places] == [(0, 0, 0), (0, 0, 0), (0, 1, 0), (1, 0, 0), (2, 0, 0)]


# -- cache ------------------------------------------------------------------------------------------------------------------------


def states(generator, rows, width):
    """Keys and values of two blocks; values are narrower than keys."""
    return [(torch.randn(rows, 2, width, 3, generator=generator), torch.randn(rows, 2, width, 4, generator=generator)) for _ in range(2)]


def write(cache, passed):
    seen = [cache.update(keys, values, block) for block, (keys, values) in enumerate(passed)]
    cache.advance(passed[0][0].shape[2])
    return seen


def content(cache):
    columns = slice(cache.columns.low, cache.columns.end)
    return [(block.keys[:, :, columns], block.values[:, :, columns]) for block in cache.block_caches]


def same(found, expected):
    return all(torch.equal(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))


def test_what_attention_sees_is_what_a_dynamic_cache_shows_it_without_being_copied():
    generator, plain, cache = torch.Generator().manual_seed(0), DynamicCache(), EngineCache(2, capacity=9)
    for width in (4, 1, 1, 3):
        passed = states(generator, 3, width)
        assert cache.get_mask_sizes(width, 0) == plain.get_mask_sizes(width, 0)
        seen = write(cache, passed)
        assert same(seen, [plain.update(keys, values, block) for block, (keys, values) in enumerate(passed)])
        assert cache.get_seq_length() == plain.get_seq_length()
        assert seen[0][0].data_ptr() == cache.block_caches[0].keys.data_ptr()
    assert cache.nbytes == 3 * 2 * 9 * (3 + 4) * 4 * 2


def test_rows_of_a_cache_can_be_chosen_in_some_blocks_or_branched_into_a_new_cache():
    generator, cache = torch.Generator().manual_seed(1), EngineCache(2, capacity=7, end=2)
    write(cache, states(generator, 2, 3))
    before = [[part.clone() for part in pair] for pair in content(cache)]
    lower, upper = torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0, 1])
    branch = cache.branched([lower, upper], capacity=8)
    assert same(content(branch), [[part[index] for part in pair] for pair, index in zip(before, (lower, upper), strict=True)])
    assert branch.block_caches[0].keys.shape == (3, 2, 8, 3)
    write(branch, [states(generator, 3, 2)[0], states(generator, 4, 2)[1]])
    assert same(content(cache), before)
    cache.select(upper, [1])
    assert same(content(cache), [before[0], [part[upper] for part in before[1]]])


def test_rows_keep_their_keys_and_values_while_others_come_and_go():
    """A cache of five rows beside lists of tensors: admission, steps, departures, rebasing, in random order."""
    rng, generator, widest = random.Random(0), torch.Generator().manual_seed(2), 4
    cache, held, done = EngineCache(2, capacity=12, rows=5, end=widest), [], Counter()

    def admit():
        prompts, width, count = rng.randrange(1, 4), rng.randrange(1, widest + 1), rng.randrange(1, 6 - len(held))
        other, passed = EngineCache(2, capacity=width + 2), states(generator, prompts, width)
        write(other, passed)
        indices = [torch.tensor([rng.randrange(prompts) for _ in range(count)]) for _ in range(2)]
        cache.admit(other, slice(len(held), len(held) + count), indices)
        assert other.nbytes == 0
        held.extend([[part[index[i]] for part in pair] for pair, index in zip(passed, indices, strict=True)] for i in range(count))

    def step():
        passed = states(generator, len(held), 1)
        write(cache, passed)
        for slot, row in enumerate(held):
            held[slot] = [[torch.cat([part, new[slot]], dim=1) for part, new in zip(*pairs, strict=True)] for pairs in zip(row, passed, strict=True)]

    def leave():
        kept = sorted(rng.sample(range(len(held)), rng.randrange(len(held))))
        gaps, movers = [slot for slot in range(len(kept)) if slot not in kept], [slot for slot in kept if slot >= len(kept)]
        cache.move(movers, gaps)
        for gap, mover in zip(gaps, movers, strict=True):
            held[gap] = held[mover]
        del held[len(kept) :]

    def clear():
        cache.clear([len(held) - 1])
        assert not any(memory[len(held) - 1].any() for block in cache.block_caches for memory in (block.keys, block.values))
        held.pop()

    for _ in range(1500):
        action = rng.choice((admit, step, step, step, step, leave, clear)) if held else admit
        if not held:
            cache.columns.low = cache.columns.end = widest
        elif cache.columns.end == cache.columns.capacity:
            if cache.columns.visible == cache.columns.capacity:
                action = leave
            else:
                cache.rebase(len(held), max(cache.columns.visible, widest))
                done["rebase"] += 1
        if action is not admit or len(held) < 5:
            action()
            done[action.__name__] += 1
        cache.columns.low = cache.columns.end - max((row[0][0].shape[1] for row in held), default=0)
        for slot, row in enumerate(held):
            for block, pair in zip(cache.block_caches, row, strict=True):
                for memory, part in zip((block.keys, block.values), pair, strict=True):
                    assert torch.equal(memory[slot, :, cache.columns.end - part.shape[1] : cache.columns.end], part)
    assert len(done) == 5 and min(done.values()) >= 30, done


# -- memory -----------------------------------------------------------------------------------------------------------------------

FOOTPRINT = Footprint(cache=400, activation=1000, scores=600, logits=300, normalising=300, hidden=100, column=100, pair=4, workspace=1000)


@pytest.fixture
def peak(monkeypatch):
    """Most bytes that engine caches held at once, seen when one of them grows or hands its rows over."""
    alive, most = weakref.WeakSet(), [0]
    start, advance, admit = EngineCache.__init__, EngineCache.advance, EngineCache.admit

    def look():
        most[0] = max(most[0], sum(cache.nbytes for cache in alive))

    def started(self, *args, **options):
        start(self, *args, **options)
        alive.add(self)

    def advanced(self, width):
        look()
        advance(self, width)

    def admitted(self, *args):
        look()
        admit(self, *args)
        look()

    for name, function in (("__init__", started), ("advance", advanced), ("admit", admitted)):
        monkeypatch.setattr(EngineCache, name, function)
    return most


@pytest.mark.parametrize("settings", [{}, {"max_rows": 12}, {"memory_budget": 1_200_000}, {"memory_budget": 500_000}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", [1, 2, None])
def test_caches_stay_within_the_plan_and_the_plan_within_the_budget(family, kind, settings, peak, tmp_path):
    model = special_model(family)
    chosen = steering_kinds(model, tmp_path)[1:3] if kind is None else [steering_kinds(model, tmp_path)[kind]]
    prompt = tuple(range(4, 54))
    rows = [
        GenerationRow((first, *prompt), 1 + 3 * (i % 3), spec.with_weights({"formality": i / 10}))
        for first in (3, 4)
        for i in range(1, 16)
        for spec in chosen
    ]
    run = Engine(Steerer(model), None, gemm="torch", **settings)
    run.generate(rows)
    assert peak[0] <= run.report.planned_bytes <= settings.get("memory_budget", 1 << 40)
    assert peak[0] <= 1.05 * run.report.cache_bytes
    assert run.report.row_steps > run.report.steps


@pytest.mark.parametrize("kind", ["response", "prompt"])
def test_long_prompts_of_rows_that_come_later_are_part_of_the_plan(kind, peak, tmp_path):
    config = FAMILIES["llama"]()
    config.max_position_embeddings = 512
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    spec = spec_for(model, tmp_path, layers=(0,), positions=kind)
    rows = [GenerationRow(tuple(3 + i % 60 for i in range(400)), 4, spec.with_weights({"formality": i / 10})) for i in range(1, 41)]
    run = Engine(Steerer(model), None, gemm="torch", max_rows=20)
    run.generate(rows)
    assert peak[0] <= run.report.planned_bytes < 3 * run.report.cache_bytes


def test_a_larger_budget_never_runs_fewer_rows_and_a_row_that_does_not_fit_is_refused():
    rows = [GenerationRow(tuple(range(3, 40)), 9)] * 60
    footprint = FOOTPRINT
    plain = Demand(rows, blocks=3, lower=1, early=False, prefixes=True, sharing=False)
    budgets = range(120_000, 4_000_000, 40_000)
    fits = [fit_generation(plain, footprint, budget, most_rows=None) for budget in budgets]
    slots = [fit.plan.rows for fit in fits]
    assert slots == sorted(slots) and slots[0] < 4 and slots[-1] == 60
    assert all(fit.bytes <= budget for fit, budget in zip(fits, budgets, strict=True))
    assert fit_generation(plain, footprint, 3_000_000, most_rows=7).plan.rows == 7
    drawn = replace(plain, rows=[row._replace(sampling=Sampling(temperature=1.0)) for row in rows])
    shared, early = replace(plain, sharing=True), replace(plain, early=True)
    costs = [demand.bytes(60, footprint._replace(scores=1500)) for demand in (shared, plain, drawn, early)]
    assert costs == sorted(costs) and len(set(costs)) == 4
    assert [demand.shared(60) for demand in (plain, shared, replace(early, sharing=True))] == [0, 3, 1]
    assert replace(early, sharing=True).shared(59) == 0
    with pytest.raises(
        ModelError, match="one row of 46 tokens needs 0 MiB beside the model's weights and the memory budget is 0 MiB. Raise memory_bu"
    ):
        fit_generation(plain, footprint, 10_000, most_rows=None)


def test_a_pass_over_the_rows_of_one_prompt_is_priced_whole():
    """Prompts that begin alike, each with more rows than run at once: a pass never meets two of them, so nothing runs beforehand."""
    rows = [GenerationRow((*range(3, 40), i), 9) for i in range(4) for _ in range(20)]
    demand = Demand(rows, blocks=3, lower=1, early=True, prefixes=True, sharing=False)
    assert (demand.prefix, demand.alike, demand.widest) == (37, [20] * 4, 38)
    only = Footprint(0, 1, 0, 0, 0, 0, 0, 0)  # nothing but activations
    assert demand.bytes(12, only) == 12 * 38
    # all at once they have their beginning in common, and the other token each of its own
    assert demand.bytes(80, only) == max(80 * 1, 20 * 38)
    assert replace(demand, prefixes=False).bytes(80, only) == 80 * 38


def test_how_many_prompts_consecutive_rows_have_at_most():
    counts = [1, 7, 2, 2, 5, 1, 3]
    rows = [GenerationRow((3, i), 9) for i, count in enumerate(counts) for _ in range(count)]
    demand = Demand(rows, blocks=3, lower=1, early=True, prefixes=True, sharing=False)
    for size in range(1, len(rows) + 1):
        windows = [len({row.tokens for row in rows[start : start + size]}) for start in range(len(rows) - size + 1)]
        assert max(windows) <= demand.met(size)
    assert [demand.met(size) for size in (1, 2, 3, 4, 20)] == [1, 2, 3, 4, 8]


def stages_of(requests, numbers, budget, early=(False,) * 8, **settings):
    contexts, _ = build_contexts(requests, numbers, 60)
    plan = fit_scoring(contexts, early, FOOTPRINT, budget, **{"most_contexts": None, "prefixes": True, "part": 0.5, **settings})
    asked = Counter((number, spec) for number, context in enumerate(contexts) for spec in context.specs)
    ran = Counter((part.number, spec) for stage in plan.stages for parts in stage.passes for part in parts for spec in part.specs)
    assert ran == asked and set(ran.values()) == {1}
    # the plan's bytes are those of its dearest pass
    prices = [pass_bytes(stage, stage.shape(parts), FOOTPRINT, 0.5) for stage in plan.stages for parts in stage.passes]
    first = [beginning_bytes(stage, FOOTPRINT, 0.5) for stage in plan.stages if stage.beginning]
    assert plan.bytes == max(prices + first) <= budget
    return plan.stages


def test_scoring_passes_are_as_full_as_the_budget_allows_and_a_context_that_does_not_fit_is_refused():
    requests = [ScoreRequest((*range(3, 30), i), (token, 5)) for i in range(3, 33) for token in range(3, 7)]
    sizes = []
    for budget in (60_000, 100_000, 300_000, 1 << 40):
        (stage,) = stages_of(requests, [0] * len(requests), budget)
        # the 27 tokens that all contexts begin with run once, but each row holds them
        assert (len(stage.beginning), stage.late) == (27, True)
        for parts, later in pairwise(stage.passes):
            assert pass_bytes(stage, stage.shape([*parts, later[0]]), FOOTPRINT, 0.5) > budget
        sizes.append([len(parts) for parts in stage.passes])
    assert sizes[-1] == [30]
    assert 10 < len(sizes[0]) > len(sizes[1]) > len(sizes[2]) > 1
    (limited,) = stages_of(requests, [0] * len(requests), 1 << 40, most_contexts=8)
    assert [len(parts) for parts in limited.passes] == [8, 8, 8, 6]
    with pytest.raises(ModelError, match="one context of 32 tokens needs 0 MiB beside the model's weights and the memory budget is 0 MiB. Raise mem"):
        stages_of(requests, [0] * len(requests), 20_000)


@pytest.mark.parametrize("early", [False, True])
def test_fewer_specs_run_at_a_time_when_one_context_with_all_of_them_is_too_much(early):
    requests = [ScoreRequest((*range(3, 30), i), (token, 5)) for i in range(3, 9) for token in range(3, 7) for _ in range(8)]
    numbers = [i % 8 for i in range(len(requests))]
    budgets = (1 << 40, 160_000, 80_000) if early else (1 << 40, 80_000, 60_000)
    found = [[stage.specs for stage in stages_of(requests, numbers, budget, [early] * 8)] for budget in budgets]
    assert found[0] == [[*range(8)]]
    assert 1 < len(found[1]) < len(found[2]) <= 8
    assert all([spec for specs in some for spec in specs] == [*range(8)] for some in found)


@pytest.mark.parametrize("budget", [None, 250_000])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_runs_is_what_was_priced(family, budget, peak, monkeypatch, tmp_path):
    """Passes as the model gets them, and the bytes of all caches together, against the plan."""
    model = special_model(family)
    monkeypatch.setattr(tree, "_WORTH", 4)
    primer = tuple(range(3, 15))
    contexts = [*((*primer, *range(20, 20 + i)) for i in range(1, 9)), (5,), (50, 51, 52)]
    kinds = steering_kinds(model, tmp_path)
    requests = [ScoreRequest(context, ending, kind) for context in contexts for kind in kinds[:7] for ending in ((7,), (7, 8, 9), (30, 31))]
    requests += [ScoreRequest(context, (9, 8), kind, response_start=1) for context in contexts[-2:] for kind in kinds[:3]]
    plans, ran, beginnings = [], [], []

    def planned(*args, **options):
        plans.append((fit_scoring(*args, **options), options["part"]))
        return plans[-1][0]

    def at(self, ids, mask, positions, cache, places, fork=None):
        found = run_at(self, ids, mask, positions, cache, places, fork)
        ran.append((len(ids), len(ids) if fork is None else len(fork.sequence), ids.shape[1], cache.columns.capacity, len(found)))
        return found

    def last(self, ids, mask, positions, cache, fork=None):
        if mask.ndim == 2:
            beginnings.append((tuple(ids[0].tolist()), 1 if fork is None else len(fork.sequence)))
        return run_last(self, ids, mask, positions, cache, fork)

    run = Engine(Steerer(model), None, gemm="torch", memory_budget=budget)
    cache_bytes = run.support.cache_bytes
    run_at, run_last = Forward.at, Forward.last
    for name, function in (("at", at), ("last", last)):
        monkeypatch.setattr(Forward, name, function)
    monkeypatch.setattr(engine, "fit_scoring", planned)
    peak[0] = 0
    run.score(requests, max_length=60)
    ((plan, part),) = plans
    shapes = [stage.shape(parts) for stage in plan.stages for parts in stage.passes]
    assert ran == [(shape.sequences, shape.rows, shape.tail, shape.columns, shape.places) for shape in shapes]
    assert beginnings == [(stage.beginning, 1 if stage.late else len(stage.specs)) for stage in plan.stages if stage.beginning]
    assert len({stage.late for stage in plan.stages}) == 2 and any(stage.beginning for stage in plan.stages) and any(shape.head for shape in shapes)
    assert run.report.planned_bytes == plan.bytes <= (budget or 1 << 40)
    # with nothing but keys and values to pay for, the dearest pass is what the caches held
    caches = Footprint(cache_bytes, 0, 0, 0, 0, 0, 0, 0)
    prices = [pass_bytes(stage, stage.shape(parts), caches, part) for stage in plan.stages for parts in stage.passes]
    masks = [shape.rows * shape.tail * shape.columns for shape in shapes]
    assert max(price - mask for price, mask in zip(prices, masks, strict=True)) == pytest.approx(peak[0], abs=len(shapes))


def test_an_engine_with_too_small_a_budget_says_so(tmp_path):
    model = random_model()
    run = Engine(Steerer(model), None, memory_budget=20_000)
    spec = spec_for(model, tmp_path)
    with pytest.raises(ModelError, match="one row of 30 tokens needs .* memory budget is 0 MiB. Raise memory_budget, shorten the prompts, or gen"):
        run.generate([GenerationRow(tuple(range(3, 23)), 10, spec)])
    with pytest.raises(ModelError, match="one context of 20 tokens needs .* Raise memory_budget, or shorten the texts"):
        run.score([ScoreRequest(tuple(range(3, 23)), (5,), spec)], max_length=60)


def test_the_footprint_of_a_token_is_what_its_keys_and_values_take():
    for family, heads in (("llama", 2), ("gpt2", 4), ("falcon", 1)):
        model = special_model(family)
        steerer = Steerer(model)
        bytes_per_token = Engine(steerer, None).support.cache_bytes
        assert bytes_per_token == 3 * 2 * heads * 8 * 4
        footprint = Footprint.of(Forward(steerer), bytes_per_token)
        assert footprint.cache == bytes_per_token
        assert footprint.scores >= 64 * 4
        assert footprint.activation >= 32 * 4


def test_a_device_that_runs_out_of_memory_gets_half_as_many_rows_until_it_fits(tmp_path, caplog):
    model = random_model()
    rows = [GenerationRow((3, 4, 5 + i % 20), 4 + i % 3, spec_for(model, tmp_path)) for i in range(20)]
    requests = [ScoreRequest((3, 4, 5 + i), (7, 8), spec_for(model, tmp_path)) for i in range(20)]
    expected = [Engine(Steerer(model), None, gemm="torch").generate(rows), Engine(Steerer(model), None).score(requests, max_length=60)]

    def small_device(most):
        def check(module, args, kwargs):
            if len(kwargs["input_ids"]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return model.register_forward_pre_hook(check, with_kwargs=True)

    run = Engine(Steerer(model), None, gemm="torch")
    assert run.support.generation is None
    handle = small_device(6)
    assert run.generate(rows) == expected[0]
    assert [s.is_greedy for s in run.score(requests, max_length=60)] == [s.is_greedy for s in expected[1]]
    assert "out of memory with 20 rows at once: going on with 10" in caplog.text
    handle.remove()
    small_device(0)
    with pytest.raises(ModelError, match="out of memory with a single row"):
        run.generate(rows)
