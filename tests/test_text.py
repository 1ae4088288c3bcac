"""Text files, data sets, and windows of tokens."""

import gzip
import json
from importlib import resources

import folders
import pytest

from rehead.converters import text
from rehead.converters.errors import InputError
from rehead.converters.text import (
    default_calibration_text,
    evaluation_text,
    read_text,
    read_texts,
    windows,
)

TEXTS = ["First.\nStill first.", "Zweite \u2028 Zeile, größer", "3"]


def lines(items):
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


@pytest.mark.parametrize("packed", [False, True])
def test_files_are_read_as_the_command_line_says(packed, tmp_path):
    def put(name, content):
        path = tmp_path / (name + ".gz" * packed)
        data = content.encode()
        path.write_bytes(gzip.compress(data) if packed else data)
        return str(path)

    assert read_text(put("a.txt", "one\r\n\n two\n")) == "one\r\n\n two\n"
    assert read_text(put("bom.txt", "\ufeffone")) == "one"
    items = [{"text": item, "id": number} for number, item in enumerate(TEXTS)]
    assert read_text(put("a.jsonl", lines(items))) == "\n\n".join(TEXTS)
    assert read_texts(put("b.jsonl", lines(items))) == TEXTS
    assert read_text(put("gaps.jsonl", "\n" + lines(items).replace("\n", "\n\n"))) == (
        "\n\n".join(TEXTS)
    )


BAD = {
    "a.txt": (b"\xff\xfehello", "not UTF-8 text .line 1"),
    "b.txt": (b"fine\nfine\n\x80", "not UTF-8 text .line 3"),
    "c.txt": (b" \n\n ", "holds no text"),
    "d.jsonl": (b"", "holds no text"),
    "e.jsonl": (b'{"text": "a"}\n{"txt": "b"}\n', "line 2, has no field `text`"),
    "f.jsonl": (b'{"text": "a"}\n\n{"text": 3}\n', "line 3, has no field `text`"),
    "g.jsonl": (b'["text"]', "line 1, has no field `text`"),
    "h.jsonl": (b'{"text": "a"}\n{"text": ', "line 2, is not valid JSON"),
    "i.jsonl": (b"[" * 99999, "line 1, is not valid JSON"),
    "j.txt.gz": (b"plain", "not a whole gzip file"),
    "k.txt.gz": (gzip.compress(b"whole" * 99)[:-9], "not a whole gzip file"),
    "l.jsonl.gz": (gzip.compress(b'{"text": 1}'), "line 1, has no field"),
    "m.csv": (b"text\n", "text is read from"),
    "n.gz": (gzip.compress(b"text"), "text is read from"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_in_one_line(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as told:
        read_text(tmp_path / name)
    assert name in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["nothing.txt", "nothing.jsonl.gz", "./nothing", "/nothing/x"])
def test_a_file_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_text(name)
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path)


class Hub:
    """Stands for the hub: one data set, whose rows are counted as they are read."""

    def __init__(self, monkeypatch, rows, split="train"):
        import datasets
        import huggingface_hub

        self.rows, self.split, self.read, self.asked = rows, split, 0, []
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: None)

    def load(self, name, configuration, streaming):
        assert streaming
        self.asked.append((name, configuration))
        return {self.split: self.stream()}

    def stream(self):
        for row in self.rows:
            self.read += 1
            yield row


def test_a_hub_data_set_is_read_as_far_as_needed(monkeypatch):
    hub = Hub(monkeypatch, [{"text": "x" * 98}] * 50)
    monkeypatch.setattr(text, "HUB_CHARACTERS", 1000)
    assert read_text("someone/some") == "\n\n".join(["x" * 98] * 10)
    assert hub.read == 10
    Hub(monkeypatch, [{"text": "a"}, {"text": "b"}], split="test")
    assert read_text("someone/some") == "a\n\nb"
    hub = Hub(monkeypatch, [{"text": "a"}])
    read_text("someone/some:small")
    assert hub.asked == [("someone/some", "small")]
    Hub(monkeypatch, [{"content": "a"}])
    with pytest.raises(InputError, match="no field `text`"):
        read_text("someone/some")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*_):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(InputError, match=r"no data set could be read.*\(no route\)"):
        read_text("someone/some")


def test_windows_are_the_consecutive_tokens_of_the_text():
    tokenizer = folders.tokenizer()
    content = "".join(chr(32 + i % 90) for i in range(1000))  # a token a character
    expected = tokenizer(content)["input_ids"]
    every = windows(tokenizer, content, 64)
    assert every.shape == (15, 64)
    assert every.flatten().tolist() == expected[: 15 * 64]
    for count in (1, 4, 15):
        assert windows(tokenizer, content, 64, count).tolist() == every[:count].tolist()
    assert windows(tokenizer, content, 64, 99).tolist() == every.tolist()
    assert windows(tokenizer, content, 1000, 1).shape == (1, 1000)
    assert 256 not in every  # no BOS


def test_a_text_of_few_tokens_a_character_is_not_cut_short():
    """One token in nine characters: the first guess of the characters needed is too small."""
    tokenizer = folders.tokenizer()
    tokenizer.add_tokens(["nine char"])
    content = "nine char" * 3000
    assert windows(tokenizer, content, 100, 10).unique().tolist() == [len(folders.VOCABULARY)]
    assert windows(tokenizer, content, 100, 30).shape == (30, 100)


def test_a_long_text_is_not_tokenised_whole():
    seen = []

    class Counting:
        def __call__(self, part, **options):
            seen.append(len(part))
            return {"input_ids": list(part.encode())}

    windows(Counting(), "x" * 10_000_000, 128, 2)
    assert sum(seen) < 10_000


def test_a_text_shorter_than_a_window_is_told():
    with pytest.raises(InputError, match="has 5 tokens, fewer than one window of 8"):
        windows(folders.tokenizer(), "short", 8, 2)
    with pytest.raises(InputError, match="at least 2"):
        windows(folders.tokenizer(), "short", 1, 1)
    with pytest.raises(InputError, match="at least 1"):
        windows(folders.tokenizer(), "short", 2, 0)


def test_the_texts_that_ship_are_long_enough_and_apart():
    assert len(default_calibration_text()) > 4_000_000
    assert len(evaluation_text()) > 200_000
    ids = []
    for name in ("calibration", "evaluation"):
        path = resources.files("rehead.data").joinpath(f"{name}.jsonl.gz")
        assert len(path.read_bytes()) < 2 << 20  # every clone and install holds it
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        # An article's id and title are what its authors are found by, as others' by their source.
        assert all(row["title"] and row["text"] for row in rows)
        assert all(row["id"] if "id" in row else row["source"] for row in rows)
        ids.append({row["id"] for row in rows if "id" in row})
    assert ids[0] and ids[1] and not ids[0] & ids[1]


def test_the_default_text_is_of_several_kinds_wherever_it_is_cut():
    text = default_calibration_text()
    # What a closed form of 16 sequences is drawn from, and one healed with 100.
    for characters in (500_000, 3_500_000):
        part = text[:characters]
        assert part.count("Question: ") > characters / 4_000
        assert part.count("Holmes") > characters / 20_000
        assert part.count("    return ") > characters / 20_000
