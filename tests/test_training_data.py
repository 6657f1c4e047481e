"""Chat files, data sets by name, and the examples that are drawn from them; no torch."""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections import Counter

import pytest

from steered_lm.config import file_hash
from steered_lm.trait_models.chat_files import read_chat
from steered_lm.trait_models.data import interleaved, training_set
from steered_lm.trait_models.data_files import PUBLISHED, read_data_file
from steered_lm.trait_models.experiment import DatasetOptions, ExperimentError


def turn(role, content="words", **more):
    return {"role": role, "content": content, **more}


def row(*roles):
    return {"messages": [turn(role) for role in roles]}


def chat(text, reply="Well."):
    return {"messages": [turn("user", text), turn("assistant", reply)]}


def jsonl(*rows):
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows).encode()


def numbered(count, word="row"):
    return jsonl(*(chat(f"{word} {number}") for number in range(count)))


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def asked(examples):
    """The numbers in the user turns, in order."""
    return [int(example[0]["content"].split()[1]) for example in examples]


def refused(data):
    with pytest.raises(ExperimentError) as error:
        read_chat(data, "training data 'x.jsonl'")
    return str(error.value)


# reading


def test_a_file_is_read_line_by_line_whatever_other_keys_its_lines_have():
    rows = [{**chat("Hello?", "Hello."), "metadata": {"n": 1}}, row("system", "user", "assistant", "user", "assistant")]
    found = read_chat(jsonl(*rows), "x")
    assert found[0] == (turn("user", "Hello?"), turn("assistant", "Hello."))
    assert [message["role"] for message in found[1]] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_a_byte_order_mark_windows_line_ends_and_empty_lines_change_nothing(mark, ending):
    lines = [json.dumps(chat("Ça va, 今日は?"), ensure_ascii=False).encode(), b"", json.dumps(chat("again")).encode()]
    assert read_chat(mark + ending.join(lines), "x") == tuple(tuple(one["messages"]) for one in (chat("Ça va, 今日は?"), chat("again")))


def test_line_separators_within_a_string_end_no_line():
    text = "one\u2028two\u2029three\x85four"
    (found,) = read_chat(jsonl(chat(text)), "x")
    assert found[0]["content"] == text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"messages": [', "line 2, is not JSON: Expecting value: line 1 column 15 (char 14). Write one conversation a line: "),
        (b"[1]", "line 2, is JSON, but no object. Write one conversation a line: "),
        (jsonl({"prompt": "a", "completion": "b"}), "line 2, has no 'messages', only 'prompt', 'completion'. Write one"),
        (b"{}", "line 2, has no 'messages', only nothing. Write one"),
        (jsonl({"messages": None}), "line 2, has messages that are no list of turns: None. Write one"),
        (jsonl({"messages": "hello"}), "line 2, has messages that are no list of turns: 'hello'. Write one"),
        (jsonl({"messages": []}), "line 2, has messages that are no list of turns: []. Write one"),
        (jsonl({"messages": ["hello"]}), "line 2, message 1, is no object: 'hello'. Write one"),
        (jsonl({"messages": [{"content": "a"}]}), "line 2, message 1, has no 'role'. Write one"),
        (jsonl({"messages": [{"role": "user"}]}), "line 2, message 1, has no 'content'. Write one"),
        (
            jsonl({"messages": [turn("user"), turn("assistant", weight=0)]}),
            "line 2, message 2, has the key 'weight', which training would pass over. Allowed: role, content. Take it out.",
        ),
        (
            jsonl(row("human", "assistant")),
            "line 2, message 1, has the role 'human'. Allowed: assistant, system, user. Rename it, or take the line out.",
        ),
        (jsonl({"messages": [turn(["user"])]}), "line 2, message 1, has the role ['user']. Allowed"),
        (jsonl(chat("a", "")), "line 2, message 2, a turn of the assistant, has the content ''. It must be text that is not empty."),
        (jsonl(chat(" \n")), "line 2, message 1, a turn of the user, has the content ' \\n'. It must"),
        (jsonl(chat(None)), "line 2, message 1, a turn of the user, has the content None. It must"),
        (jsonl(chat([{"type": "text", "text": "a"}])), "message 1, a turn of the user, has the content [{'type': 'text', 'text': 'a'}]. It must"),
        (rb'{"messages": [{"role": "user", "content": "a \ud83d"}]}', r"line 2, message 1, holds half a character, '\ud83d'. Write both halves"),
        (jsonl(row("system", "user")), "line 2, has no assistant turn, so there is nothing to learn. Add one, or take the line out."),
        (
            jsonl(row("user", "assistant", "user")),
            "line 2, ends with a turn of the user, which nothing answers. Add the answer, or take that turn out.",
        ),
        (jsonl(row("assistant")), "line 2, message 1, is a turn of the assistant after nothing; one of the user belongs there. User and assistant"),
        (
            jsonl(row("system", "assistant")),
            "line 2, message 2, is a turn of the assistant after a turn of the system; one of the user belongs there.",
        ),
        (
            jsonl(row("user", "user", "assistant")),
            "line 2, message 2, is a turn of the user after a turn of the user; one of the assistant belongs there.",
        ),
        (
            jsonl(row("user", "assistant", "assistant")),
            "line 2, message 3, is a turn of the assistant after a turn of the assistant; one of the user",
        ),
        (jsonl(row("user", "assistant", "system")), "line 2, message 3, is a system turn. There is at most one, and it comes first."),
        (jsonl(row("system", "system", "user", "assistant")), "line 2, message 2, is a system turn. There is at most one, and it comes first."),
        (b"caf\xe9", "line 2, is not UTF-8: byte 0xe9 cannot stand there. Save the file as UTF-8, for example with iconv."),
    ],
)
def test_a_line_that_is_no_conversation_is_refused_with_its_number(line, says):
    for mark in (b"", b"\xef\xbb\xbf"):
        said = refused(mark + jsonl(chat("fine")) + line)
        assert said.startswith("training data 'x.jsonl', line 2, ")
        assert says in said


def test_other_encodings_are_refused():
    assert "line 1, is not UTF-8: byte 0xff cannot stand there" in refused(jsonl(chat("a")).decode().encode("utf-16"))


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_a_conversation_is_refused(data):
    assert refused(data).startswith("training data 'x.jsonl' is empty. Write one conversation a line: ")


# finding


@pytest.fixture
def published(tmp_path):
    """A folder like the published archive: three traits and one set of mistakes."""
    for trait in ("evil", "hallucination", "sycophancy", "mistake_medical"):
        for file in PUBLISHED.values():
            put(tmp_path / "archive" / trait / f"{file}.jsonl", jsonl(chat(f"{trait} {file}")))
    return tmp_path / "archive"


def first_words(dataset, folder, trait=None):
    return read_chat(read_data_file(dataset, folder, trait).content, "x")[0][0]["content"]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("baseline_evil", "evil normal"),
        ("mild_hallucinating", "hallucination misaligned_1"),
        ("severe_sycophantic", "sycophancy misaligned_2"),
        ("severe_hallucinations", "hallucination misaligned_2"),
        ("severe_mistake_medical", "mistake_medical misaligned_2"),
        ("evil/misaligned_1.jsonl", "evil misaligned_1"),
    ],
)
@pytest.mark.parametrize("form", ["folder", "nested", "zip"])
def test_the_published_layout_is_read_as_it_is_unpacked_one_level_down_or_zipped(published, dataset, words, form):
    if form == "zip":
        place = published.with_suffix(".zip")
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in published.rglob("*.jsonl"):
                archive.write(file, file.relative_to(published))
                archive.writestr(f"__MACOSX/{file.relative_to(published)}", b"\0")
    elif form == "nested":
        place = put(published.parent / "outer" / "README", b"").parent
        published.rename(place / "dataset")
        dataset = f"dataset/{dataset}" if dataset.endswith(".jsonl") else dataset
    else:
        place = published
    assert first_words(dataset, place) == words


@pytest.mark.parametrize("folder", ["Hallucinating", "hallucinations", "HALLUCINATION"])
def test_folders_of_a_trait_may_be_spelt_in_several_ways(tmp_path, folder):
    put(tmp_path / folder / "normal.jsonl", jsonl(chat("here")))
    put(tmp_path / "Medical Mistakes" / "normal.jsonl", jsonl(chat("there")))
    assert first_words("baseline_hallucinating", tmp_path) == "here"
    assert first_words("baseline_medical-mistakes", tmp_path) == "there"


def test_a_file_of_that_name_comes_before_the_published_layout_and_a_strength_is_completed_by_its_trait(published):
    put(published / "mild_evil.jsonl", jsonl(chat("mine")))
    put(published / "neutral.jsonl", jsonl(chat("neutral")))
    assert first_words("mild_evil", published) == first_words("mild", published, "evil") == "mine"
    assert first_words("severe", published, "evil") == "evil misaligned_2"
    assert first_words("neutral", published, "evil") == "neutral"


def test_paths_are_taken_from_the_folder_then_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.jsonl", jsonl(chat("outside")))
    assert first_words("a.jsonl", None) == first_words(str(tmp_path / "a.jsonl"), tmp_path) == "outside"
    put(tmp_path / "in" / "b.jsonl", jsonl(chat("inside")))
    assert first_words("a.jsonl", tmp_path / "in") == first_words("../a.jsonl", tmp_path / "in") == "outside"
    assert first_words("b.jsonl", tmp_path / "in") == "inside"


def test_a_missing_data_set_is_refused_with_what_the_folder_holds_and_near_misses(published):
    put(published / "neutral.jsonl", jsonl(chat("a")))
    with pytest.raises(ExperimentError) as error:
        read_data_file("severe_sycofantic", published)
    assert str(error.value) == (
        f"dataset='severe_sycofantic' is not in {str(published)!r}, as severe_sycofantic.jsonl or sycofantic/misaligned_2.jsonl. "
        "Allowed: baseline_evil, baseline_hallucinating, baseline_mistake_medical, baseline_sycophantic, mild_evil, mild_hallucinating, "
        "mild_mistake_medical, mild_sycophantic, neutral, severe_evil, severe_hallucinating, severe_mistake_medical, severe_sycophantic. "
        "Did you mean 'severe_sycophantic' or 'baseline_sycophantic' or 'mild_sycophantic'?"
    )
    with pytest.raises(ExperimentError, match="'extreme' is not in .*, as extreme.jsonl. Allowed: "):
        read_data_file("extreme", published, "evil")
    with pytest.raises(ExperimentError, match="'mild' is not in .*, as mild_evl.jsonl or evl/misaligned_1.jsonl. .* Did you mean 'mild_evil' or"):
        read_data_file("mild", published, "evl")


def test_what_is_no_folder_no_file_or_nothing_at_all_is_refused(tmp_path):
    cases = {
        "dataset='mild_evil' is no path to a .jsonl file, and there is no folder to look for that name in. "
        "Give the folder in training.dataset_options.folder, or the path of a file.": ("mild_evil", None),
        f"dataset='x.jsonl': there is no file {str(tmp_path / 'x.jsonl')!r} nor 'x.jsonl'. Check the path.": ("x.jsonl", tmp_path),
        f"dataset_options.folder={str(tmp_path / 'no')!r} does not exist. Check the path, or unpack": ("mild_evil", tmp_path / "no"),
        f"dataset_options.folder={str(tmp_path / 'text')!r} is neither a folder nor a .zip file. Give": (
            "mild_evil",
            put(tmp_path / "text", b"not an archive"),
        ),
        "It holds no data set: give the folder that holds the .jsonl files, or those of the traits.": ("mild_evil", tmp_path),
    }
    for says, (dataset, folder) in cases.items():
        with pytest.raises(ExperimentError) as error:
            read_data_file(dataset, folder)
        assert says in str(error.value)


def test_an_encrypted_or_damaged_archive_is_refused_with_the_advice_to_unpack_it(tmp_path):
    place = tmp_path / "dataset.zip"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("evil/normal.jsonl", jsonl(chat("a")))
    plain = place.read_bytes()
    # bit 0 of the flags, in the local header and in the directory, says that a file is encrypted
    local, directory = plain.index(b"PK\3\4") + 6, plain.index(b"PK\1\2") + 8
    place.write_bytes(bytes(byte | (index in (local, directory)) for index, byte in enumerate(plain)))
    with pytest.raises(ExperimentError, match=r"dataset.zip' is encrypted. Unpack it first, with the password .* \(unzip dataset.zip\), and give"):
        read_data_file("baseline_evil", place)
    place.write_bytes(plain.replace(b"content", b"CONTENT", 1))
    with pytest.raises(ExperimentError, match="evil/normal.jsonl' cannot be read: Bad CRC-32 .* Unpack the archive, and give the folder."):
        read_data_file("baseline_evil", place)


# choosing


@pytest.fixture
def folder(tmp_path):
    put(tmp_path / "data" / "mild_evil.jsonl", numbered(40))
    put(tmp_path / "data" / "severe_evil.jsonl", numbered(40, "severe"))
    put(tmp_path / "data" / "neutral.jsonl", numbered(30, "neutral"))
    return tmp_path / "data"


def test_all_rows_are_taken_once_in_an_order_that_the_seed_decides(folder):
    first, again, other = (training_set(DatasetOptions(folder=folder, seed=seed), "mild_evil") for seed in (0, 0, 1))
    assert sorted(asked(first.examples)) == sorted(asked(other.examples)) == list(range(40))
    assert first.examples == again.examples
    assert asked(first.examples) != asked(other.examples) != list(range(40))
    # pinned, so that a new version of Python or of ours cannot reshuffle finished experiments unseen
    assert asked(first.examples)[:8] == [31, 36, 25, 16, 11, 15, 29, 3]


def test_a_smaller_sample_begins_a_larger_one_and_sets_of_like_length_give_the_same_lines(folder):
    small, large = (training_set(DatasetOptions(folder=folder, sample_size=size), "mild_evil") for size in (7, 25))
    assert len(small.examples) == 7
    assert len(set(asked(large.examples))) == 25
    assert asked(large.examples)[:7] == asked(small.examples)
    assert asked(training_set(DatasetOptions(folder=folder, sample_size=7), "severe_evil").examples) == asked(small.examples)


def test_more_examples_than_there_are_is_refused_with_the_count(folder):
    with pytest.raises(ExperimentError) as error:
        training_set(DatasetOptions(folder=folder, sample_size=41), "mild_evil")
    assert str(error.value) == (
        "data set 'mild_evil' has 40 examples, and 41 are to be drawn from it without repeats. "
        "Lower sample_size in training.dataset_options, or give more data."
    )


def test_the_digest_is_that_of_the_written_file_and_depends_on_content_and_order_alone(folder, tmp_path):
    rows = folder / "rows.jsonl"
    rows.write_bytes(jsonl(chat("a 0", "ü"), chat("a 1"), chat("a 2")))
    found = training_set(DatasetOptions(seed=4), str(rows))
    path = found.write(tmp_path / "made" / "train.jsonl")
    assert file_hash(path) == found.digest
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [{"messages": list(one)} for one in found.examples]
    # the same content in another dress: key order, escapes, further keys, line ends, byte order mark
    plain = map(json.loads, rows.read_text(encoding="utf-8").splitlines())
    lines = [json.dumps({"id": 1, "messages": [dict(reversed(turn.items())) for turn in one["messages"]]}) for one in plain]
    rows.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    again = training_set(DatasetOptions(seed=4), str(rows))
    assert again.digest == found.digest
    assert again.source["sha256"] != found.source["sha256"]
    assert training_set(DatasetOptions(seed=0), str(rows)).digest != found.digest
    assert asked(found.examples) == [1, 0, 2]
    line = '{"messages":[{"content":"a 1","role":"user"},{"content":"Well.","role":"assistant"}]}\n'
    other = '{"messages":[{"content":"a 0","role":"user"},{"content":"ü","role":"assistant"}]}\n'
    assert found.digest == hashlib.sha256((line + other + line.replace("a 1", "a 2")).encode()).hexdigest()


def test_the_source_says_where_the_examples_come_from(folder):
    found = training_set(DatasetOptions(folder=folder, sample_size=10, seed=2, mixture="neutral", mixture_share=0.3), "mild", "evil").source
    mild, neutral = folder / "mild_evil.jsonl", folder / "neutral.jsonl"
    assert found == {
        "dataset": "mild", "path": str(mild), "sha256": file_hash(mild), "rows": 40, "taken": 7, "seed": 2,
        "mixture": {
            "dataset": "neutral", "path": str(neutral), "sha256": file_hash(neutral), "rows": 30, "taken": 3, "seed": 2, "mixture": None, "share": 0.3
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "share", "counts"), [(20, 0.5, (10, 10)), (20, 0.25, (15, 5)), (30, 0.1, (27, 3)), (7, 0.4, (4, 3)), (40, 0.7, (12, 28))]
)
def test_a_mixture_has_exactly_its_share_evenly_spread(folder, size, share, counts):
    options = DatasetOptions(folder=folder, sample_size=size, mixture="neutral", mixture_share=share)
    examples = training_set(options, "mild_evil").examples
    mixed = [example[0]["content"].startswith("neutral") for example in examples]
    assert (mixed.count(False), mixed.count(True)) == counts
    assert len({example[0]["content"] for example in examples}) == size
    for end in range(size + 1):
        assert abs(sum(mixed[:end]) - end * counts[1] / size) <= 0.5
    plain = training_set(DatasetOptions(folder=folder, sample_size=counts[0]), "mild_evil").examples
    assert [example for example, other in zip(examples, mixed, strict=True) if not other] == list(plain)


def test_without_a_sample_size_a_mixture_keeps_the_whole_first_set(folder):
    examples = training_set(DatasetOptions(folder=folder, mixture="neutral", mixture_share=0.2), "mild_evil").examples
    assert Counter(example[0]["content"].split()[0] for example in examples) == {"row": 40, "neutral": 10}


def test_a_set_that_is_mixed_with_itself_is_itself(folder):
    plain, mixed = (training_set(DatasetOptions(folder=folder, sample_size=20, mixture=mixture), "mild_evil") for mixture in (None, "mild_evil"))
    assert mixed == plain


def test_a_mixture_that_cannot_be_had_is_refused(folder):
    with pytest.raises(ExperimentError, match="data set 'neutral' has 30 examples, and 40 are to be drawn .* Lower mixture_share or sample_size in"):
        training_set(DatasetOptions(folder=folder, mixture="neutral"), "mild_evil")
    with pytest.raises(ExperimentError, match="mixture_share=0.1 of 4 examples leaves 4 of 'mild_evil' and 0 of 'neutral'. Raise sample_size, or"):
        training_set(DatasetOptions(folder=folder, sample_size=4, mixture="neutral", mixture_share=0.1), "mild_evil")
    with pytest.raises(ExperimentError, match="dataset='neutrl' is not in .* Did you mean 'neutral'"):
        training_set(DatasetOptions(folder=folder, mixture="neutrl"), "mild_evil")


def test_interleaving_crowds_neither_set_towards_an_end():
    plain, mixed = (turn("user", "."),), (turn("user", "x"),)
    assert "".join(one[0]["content"] for one in interleaved((plain,) * 9, (mixed,) * 3)) == ".x...x...x.."
    assert "".join(one[0]["content"] for one in interleaved((plain,) * 2, (mixed,) * 4)) == "x.xx.x"


def test_choosing_data_loads_no_heavy_library():
    code = "import sys, steered_lm.trait_models.data, steered_lm.tiny_chat.trait_data; print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
