"""Models by name: pulled from a hub that misbehaves, found in other programs' folders, shown, deleted."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import synthetic
from click.testing import CliRunner, Result
from gguf import GGUFWriter
from hub_server import COMMIT, FakeHub, serving

from aisp_local import Aligner, shipped
from aisp_local.cli.generate import generate
from aisp_local.cli.main import main
from aisp_local.errors import AispError, InputError, ModelError
from aisp_local.files import hold
from aisp_local.models import all_models, find_model, hub, store
from aisp_local.models.hub import Hub, choose, parse
from aisp_local.models.names import is_model, parts_of, tag_of

pytestmark = pytest.mark.native

REPOSITORY = "somebody/Story-GGUF"
DATA = b"GGUF" + (bytes(range(256)) * 20_000)[4:]  # 5 MB
VARIABLES = ("AISP_MODELS", "HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "LLAMA_CACHE")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home."""
    for name in (*VARIABLES, "XDG_DATA_HOME", "XDG_CACHE_HOME", "AISP_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = {
        "README.md": b"hello",
        "story-Q4_K_M.gguf": DATA,
        "story-Q8_0.gguf": shipped.model().read_bytes(),
        "mmproj-story-F16.gguf": b"GGUF",
        "big/story-BF16-00001-of-00002.gguf": b"GGUF one",
        "big/story-BF16-00002-of-00002.gguf": b"two",
    }
    with serving(FakeHub({REPOSITORY: files, "somebody/empty": {"config.json": b"{}"}})) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.endpoint)
        yield found


def quick() -> Hub:
    made = Hub()
    made.pause = 0.001
    return made


def pull(tag: str = "Q4_K_M") -> store.Pulled:
    made = quick()
    listing = made.list_files(REPOSITORY)
    return made.pull(listing, choose(listing, tag), lambda *_: None)


def parts() -> list[Path]:
    return sorted(store.folder().rglob("*.part"))


def aisp(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


def test_a_pulled_model_works_by_its_name_wherever_a_path_does(fake: FakeHub, home: Path) -> None:
    done = aisp("models", "pull", f"hf.co/{REPOSITORY}:q8_0")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{REPOSITORY}:Q8_0\n"
    path = home / ".local/share/aisp-local/models/somebody/Story-GGUF/story-Q8_0.gguf"
    assert path.read_bytes() == shipped.model().read_bytes() and parts() == []
    for name in (f"{REPOSITORY}:Q8_0", REPOSITORY, REPOSITORY.lower(), "story-Q8_0", "story-Q8_0.gguf", str(path)):
        assert find_model(name) == path, name
    assert find_model(f"https://huggingface.co/{REPOSITORY}:Q8_0") == path
    with Aligner.load(REPOSITORY, lambda prompt, responses: [0.0] * len(responses)) as aligner:
        assert aligner.model_name == str(path)
    with generate.make_context("generate", ["Tell me a story.", "-m", REPOSITORY]) as context:
        assert context.params["model"] == path
    asked = len(fake.asked)
    again = aisp("models", "pull", f"{REPOSITORY}:Q8_0")
    assert again.exit_code == 0 and len(fake.asked) == asked + 1, "the file is here"
    assert fake.asked[-1][0] == f"api/models/{REPOSITORY}/revision/main"


def test_list_show_and_rm(fake: FakeHub, home: Path) -> None:
    pull("Q8_0")
    rows = {row["name"]: row for row in json.loads(aisp("models", "list", "--json").stdout)}
    row = rows[f"{REPOSITORY}:Q8_0"]
    assert (row["source"], row["quantisation"], row["architecture"]) == ("pulled", "Q8_0", "llama")
    assert row["bytes"] == shipped.model().stat().st_size
    listed = aisp("models", "list").stdout
    assert listed.startswith(f"{REPOSITORY}:Q8_0") and "storyteller" in listed
    about = json.loads(aisp("models", "show", REPOSITORY, "--json").stdout)
    assert about["sha256"] == hashlib.sha256(shipped.model().read_bytes()).hexdigest()
    assert about["kv_bytes_per_token"] == 6 * 2 * 64 * 2 and about["parameters"] == 3_062_208
    assert about["can_be_aligned"] and about["chat_template"] and about["context"] == 512
    shown = aisp("models", "show", REPOSITORY).stdout
    assert "can be aligned yes" in shown and "1536 bytes a token" in shown

    assert "not deleted" in aisp("models", "rm", "talker", "--yes").stderr
    kept = aisp("models", "rm", REPOSITORY, stdin="n\n")
    assert kept.exit_code == 1 and "nothing was deleted" in kept.stderr and find_model(REPOSITORY).exists()
    assert aisp("models", "rm", REPOSITORY).exit_code == 1, "nobody answers"
    gone = aisp("models", "rm", REPOSITORY, stdin="y\n")
    assert "is deleted" in gone.stdout
    assert list(store.folder().iterdir()) == []
    unknown = aisp("models", "show", "storyteler")
    assert unknown.exit_code == 2 and "did you mean storyteller?" in unknown.stderr


def test_a_broken_connection_is_continued_where_it_broke(fake: FakeHub) -> None:
    fake.break_after, fake.breaks = 1_507_328, 2
    pull()
    assert [asked[1] for asked in fake.asked[1:]] == [None, "bytes=1507328-", "bytes=3014656-"]
    assert find_model(REPOSITORY).read_bytes() == DATA


def test_what_broke_off_for_good_is_continued_by_the_next_call(fake: FakeHub) -> None:
    fake.break_after, fake.breaks = 0, 100
    with pytest.raises(AispError, match="broke off after 0 of 5120000 bytes"):
        pull()
    fake.break_after, fake.breaks = 1_966_080, 1
    begun = len(fake.asked)
    pull()
    assert [asked[1] for asked in fake.asked[begun + 1 :]] == [None, "bytes=1966080-"]


def test_what_was_begun_is_listed_and_can_be_deleted(fake: FakeHub) -> None:
    fake.break_after, fake.breaks, fake.wrong_range = 983_040, 1, True
    with pytest.raises(AispError):
        pull()
    assert f"{REPOSITORY}: 1.0 MB of a download that was broken off" in aisp("models", "list").stdout
    assert "is deleted, 1.0 MB are free" in aisp("models", "rm", f"{REPOSITORY}:Q4_K_M", "--yes").stdout
    assert list(store.folder().iterdir()) == []
    assert aisp("models", "rm", REPOSITORY, "--yes").exit_code == 2


def test_a_killed_pull_goes_on(fake: FakeHub, home: Path) -> None:
    fake.break_after, fake.breaks, fake.hold = 1_966_080, 1, threading.Event()
    command = [sys.executable, "-m", "aisp_local", "models", "pull", REPOSITORY]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not (parts() and parts()[0].stat().st_size) and time.monotonic() < limit:
        time.sleep(0.02)
    process.kill()
    process.wait()
    fake.hold.set()
    have = parts()[0].stat().st_size
    assert 0 < have <= 1_966_080 and store.all_pulled() == []
    pull()
    assert fake.asked[-1][1] == f"bytes={have}-"
    assert find_model(REPOSITORY).read_bytes() == DATA and parts() == []


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"digests": {"story-Q4_K_M.gguf": "0" * 64}}, "does not match the hub's hash"),
        ({"surplus": b"more"}, "sends more than the 5120000 bytes"),
        ({"without_digest": True}, "gives no hash"),
        ({"digests": {"story-Q4_K_M.gguf": "nonsense"}}, "gives no hash"),
        ({"listing": b"<html>"}, "no list of files"),
        ({"listing": b'{"sha": "x", "siblings": [3]}'}, "no list of files"),
        ({"listing": b"[" * 100_000}, "no list of files"),
    ],
)
def test_lies_leave_nothing(fake: FakeHub, lies: dict[str, object], message: str) -> None:
    for name, value in lies.items():
        setattr(fake, name, value)
    with pytest.raises(AispError, match=message):
        pull()
    assert store.all_pulled() == [] and all(path.stat().st_size == 0 for path in parts())
    assert not list(store.folder().rglob("*.gguf"))


def test_files_in_git_itself_are_checked_too(fake: FakeHub) -> None:
    fake.in_git = frozenset({"story-Q4_K_M.gguf"})
    assert next(iter(pull().files.values())).startswith("git:")
    store.remove([*store.all_pulled()[0].paths(), store.all_pulled()[0].record])
    information = fake.info(REPOSITORY)
    fake.files[REPOSITORY]["story-Q4_K_M.gguf"] = DATA[::-1]
    fake.listing = information
    with pytest.raises(AispError, match="does not match the hub's hash"):
        pull()


def test_the_fake_speaks_the_hubs_protocol(fake: FakeHub, home: Path) -> None:
    """As its own client reads it: the same files, sizes and hashes, and the same errors."""
    client = pytest.importorskip("huggingface_hub")
    fake.in_git = frozenset({"README.md"})
    fake.gated = frozenset({"somebody/empty"})
    api = client.HfApi(endpoint=fake.endpoint, token=False)
    listed = {s.rfilename: s for s in api.model_info(REPOSITORY, revision="main", files_metadata=True).siblings}
    ours = quick().list_files(REPOSITORY).files
    assert set(listed) == set(ours)
    for name, file in ours.items():
        theirs = listed[name]
        digest = f"sha256:{theirs.lfs.sha256}" if theirs.lfs else f"git:{theirs.blob_id}"
        assert (file.size, file.digest) == (theirs.size, digest), name
    for repository, error in (("somebody/nothing", "RepositoryNotFoundError"), ("somebody/empty", "GatedRepoError")):
        with pytest.raises(getattr(client.errors, error)):
            api.model_info(repository, revision="main")
    with pytest.raises(client.errors.RevisionNotFoundError):
        api.model_info(REPOSITORY, revision="v9")


def test_a_hub_without_ranges_sends_the_file_again(fake: FakeHub) -> None:
    fake.break_after, fake.breaks, fake.ranges = 983_040, 1, False
    pull()
    assert find_model(REPOSITORY).read_bytes() == DATA


def test_another_range_than_asked_is_refused_and_adds_nothing(fake: FakeHub) -> None:
    fake.break_after, fake.breaks, fake.wrong_range = 983_040, 1, True
    with pytest.raises(AispError, match="asked for story-Q4_K_M.gguf from byte 983040 on and answered 'bytes 0-"):
        pull()
    assert parts()[0].stat().st_size == 983_040
    fake.wrong_range = False
    pull()
    assert find_model(REPOSITORY).read_bytes() == DATA


def test_a_part_that_is_too_long_is_begun_again(fake: FakeHub) -> None:
    fake.break_after, fake.breaks, fake.wrong_range = 983_040, 1, True
    with pytest.raises(AispError):
        pull()
    fake.wrong_range = False
    parts()[0].write_bytes(DATA + b"x")
    pull()
    assert find_model(REPOSITORY).read_bytes() == DATA


def test_a_busy_hub_is_asked_again(fake: FakeHub) -> None:
    fake.statuses = [429, 503, 500]
    said: list[str] = []
    made = quick()
    made.notice = said.append
    assert made.list_files(REPOSITORY).commit == COMMIT
    assert said == [f"{fake.endpoint}: status {status}; trying again in 0 s" for status in (429, 503, 500)]
    fake.statuses = [503] * 5
    with pytest.raises(AispError, match=r"cannot be reached \(status 503\)"):
        pull()


def test_the_token_stays_with_the_hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect to another host, where the files of the real hub are, does not get it."""
    fake.gated, fake.token = frozenset({REPOSITORY}), "hf_secret"
    with pytest.raises(InputError, match=f"is gated: accept its terms at {fake.endpoint}/{REPOSITORY}; set HF_TOKEN"):
        pull()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match="the token may not read it"):
        pull()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake.cdn = fake.endpoint.replace("127.0.0.1", "localhost")
    pull()
    assert fake.asked[-2][2] == "Bearer hf_secret" and fake.asked[-1][0].startswith("cdn/")
    assert fake.asked[-1][2] is None


def test_the_token_that_a_login_kept(fake: FakeHub, home: Path) -> None:
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/token").write_text("hf_kept\n")
    assert Hub().token == "hf_kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["somebody/nothing"], "somebody/nothing does not exist at"),
        ([REPOSITORY, "--revision", "v9"], "has no revision v9"),
        (["somebody/empty"], "holds no GGUF model"),
        ([f"{REPOSITORY}:Q2_K"], "no model that matches 'Q2_K'"),
        ([f"{REPOSITORY}:story"], "several models that match 'story'"),
        ([f"{REPOSITORY}:Q8_0", "--file", "*"], "both a tag and --file"),
        (["not a repository"], "is not a repository"),
        (["../../etc"], "is not a repository"),
        (["a/../b"], "is not a repository"),
    ],
)
def test_what_cannot_be_pulled_is_one_sentence(fake: FakeHub, arguments: list[str], message: str) -> None:
    done = aisp("models", "pull", *arguments)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert len(done.stderr.strip().splitlines()) == 1 and not store.folder().exists()


def test_a_file_that_only_says_that_it_is_a_model(fake: FakeHub) -> None:
    fake.files[REPOSITORY]["story-Q4_K_M.gguf"] = b"<!doctype html>"
    with pytest.raises(AispError, match=r"story-Q4_K_M.gguf is no GGUF file, whatever its name says; it was deleted"):
        pull()
    assert not parts() and not list(store.folder().rglob("*.gguf"))


def test_no_hub_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AispError, match=r"127.0.0.1:9 cannot be reached \(.*refused.*\); check the connection"):
        pull()
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    with pytest.raises(InputError, match="nonsense is no address; check HF_ENDPOINT"):
        pull()


def test_split_models_are_pulled_whole(fake: FakeHub) -> None:
    pulled = pull("BF16")
    assert list(pulled.files) == [f"big/story-BF16-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert [path.read_bytes() for path in pulled.paths()] == [b"GGUF one", b"two"]
    assert find_model(f"{REPOSITORY}:BF16") == pulled.paths()[0]
    pulled.paths()[1].unlink()
    assert store.all_pulled() == [], "a model that lacks a part is none"
    del fake.files[REPOSITORY]["big/story-BF16-00002-of-00002.gguf"]
    with pytest.raises(InputError, match="lacks parts"):
        pull("BF16")


def test_names_that_lead_out_of_the_folder_are_refused(fake: FakeHub) -> None:
    fake.files[REPOSITORY]["../../../evil-Q2_K.gguf"] = b"GGUF"
    with pytest.raises(InputError, match="leads out of its folder"):
        pull("Q2_K")


def test_a_full_disk_is_said_before_anything_is_downloaded(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="0.0 GB are missing and .* has room for 0.0 GB"):
        pull()
    assert len(fake.asked) == 1


def test_two_pulls_of_one_file_do_not_spoil_it(fake: FakeHub) -> None:
    listing = quick().list_files(REPOSITORY)
    path = store.file_path(REPOSITORY, "story-Q4_K_M.gguf")
    path.parent.mkdir(parents=True)
    part = hub._part(path, listing.files["story-Q4_K_M.gguf"])
    with part.open("ab") as out, pytest.raises(InputError, match="pulled by another process"):
        hold(out, "")
        pull()


def test_what_tags_and_parts_mean() -> None:
    tags = {
        "Llama-3.2-1B-Instruct-Q4_K_M.gguf": "Q4_K_M",
        "model.q8_0.gguf": "Q8_0",
        "Qwen3-8B-UD-Q4_K_XL.gguf": "UD-Q4_K_XL",
        "gemma-2b-it-IQ3_XXS.gguf": "IQ3_XXS",
        "gpt-oss-20b-mxfp4.gguf": "MXFP4",
        "big/x-BF16-00001-of-00003.gguf": "BF16",
        "storyteller.gguf": "storyteller",
        "Qwen2.gguf": "Qwen2",
    }
    assert {name: tag_of(name) for name in tags} == tags
    assert is_model("a.GGUF") and is_model("a-00001-of-00002.gguf") and not is_model("a-00002-of-00002.gguf")
    assert not is_model("mmproj-a.gguf") and not is_model("a.safetensors") and not is_model(".a.gguf")
    names = ["d/a-00002-of-00002.gguf", "d/a-00001-of-00002.gguf", "a-00001-of-00002.gguf"]
    assert parts_of("d/a-00001-of-00002.gguf", names) == ["d/a-00001-of-00002.gguf", "d/a-00002-of-00002.gguf"]
    assert parse("hf.co/a/b:Q4_K_M") == ("a/b", "Q4_K_M") and parse("https://huggingface.co/a/b/") == ("a/b", "")


def test_models_of_other_programs_are_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shipped.talker().read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    texts = {
        "registry.ollama.ai/library/talk/latest": json.dumps({"layers": [{"mediaType": "x", "digest": "y"}, layer]}),
        "registry.ollama.ai/me/talk/small": json.dumps({"layers": [layer]}),
        "hf.co/them/Talk-GGUF/Q8_0": json.dumps({"layers": [layer]}),
        "registry.ollama.ai/library/broken/latest": "{",
        "registry.ollama.ai/library/evil/latest": json.dumps({"layers": [layer | {"digest": "../../x"}]}),
    }
    for name, text in texts.items():
        manifest = home / ".ollama/models/manifests" / name
        manifest.parent.mkdir(parents=True)
        manifest.write_text(text)
    files = {
        f".ollama/models/blobs/sha256-{digest}": data,
        ".lmstudio/models/them/Talk-GGUF/talk-Q4_K_M.gguf": data,
        ".lmstudio/models/them/Talk-GGUF/mmproj-talk.gguf": data,
        ".cache/llama.cpp/them_talk-q5.gguf": data,
        f".cache/huggingface/hub/models--them--Talk2/blobs/{digest}": data,
    }
    for name, content in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    snapshot = home / ".cache/huggingface/hub/models--them--Talk2/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "talk-Q6_K.gguf").symlink_to(f"../../blobs/{digest}")
    found = {model.name: model for model in all_models()}
    assert {name: model.source for name, model in found.items() if model.source != "shipped"} == {
        "them/Talk-GGUF:Q4_K_M": "LM Studio",
        "them/Talk-GGUF:Q8_0": "Ollama",
        "them_talk-q5": "llama.cpp",
        "them/Talk2:Q6_K": "Hugging Face",
    }
    assert find_model("them/talk2").read_bytes() == data and found["them/Talk2:Q6_K"].sha256 == digest
    monkeypatch.setenv("OLLAMA_MODELS", str(home / ".ollama/models"))
    assert find_model("hf.co/them/Talk-GGUF:Q8_0").name == f"sha256-{digest}"
    assert aisp("models", "show", "them/Talk2").exit_code == 0


def test_the_names_that_ollama_knows(home: Path) -> None:
    for digit, name in ((1, "registry.ollama.ai/library/talk/latest"), (2, "registry.ollama.ai/me/talk/3b")):
        blob = home / f".ollama/models/blobs/sha256-{str(digit) * 64}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(shipped.talker().read_bytes())
        manifest = home / ".ollama/models/manifests" / name
        manifest.parent.mkdir(parents=True)
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{str(digit) * 64}"}
        manifest.write_text(json.dumps({"layers": [layer]}))
    assert find_model("talk") == find_model("talk:latest") and find_model("talk").name.endswith("1")
    assert find_model("me/talk:3b") == find_model("me/talk") and find_model("me/talk").name.endswith("2")


def test_an_existing_path_wins_and_near_names_are_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    Path("talker").write_bytes(b"mine")
    assert find_model("talker") == Path("talker")
    assert find_model("~/talker") == home / "talker"
    with pytest.raises(ModelError, match="no file talkr and no model of that name; did you mean talker"):
        find_model("talkr")
    with pytest.raises(ModelError, match="models list shows all, models pull downloads one"):
        find_model("xyz/abcdefghij")
    with pytest.raises(ModelError, match=r"model file nowhere\.gguf does not exist"):
        find_model("nowhere.gguf")


def test_several_of_a_name_are_told_apart(fake: FakeHub) -> None:
    pull("Q4_K_M"), pull("Q8_0")
    with pytest.raises(ModelError, match=f"several models are called .*; say which: {REPOSITORY}:Q4_K_M, "):
        find_model(REPOSITORY)


def test_what_cannot_be_aligned_says_why(home: Path) -> None:
    writer = GGUFWriter(home / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    assert (
        "can be aligned no: it holds an adapter, not a model"
        in aisp("models", "show", str(home / "adapter.gguf")).stdout
    )
    synthetic.write_llama(home / "weights.gguf", vocab="none")
    assert "no: holds no tokenizer" in aisp("models", "show", str(home / "weights.gguf")).stdout
    (home / "half.gguf").write_bytes(shipped.model().read_bytes()[:10_000])
    half = aisp("models", "show", str(home / "half.gguf"))
    assert half.exit_code == 2 and "cannot be read" in half.stderr
    (home / ".lmstudio/models/a/b").mkdir(parents=True)
    (home / ".lmstudio/models/a/b/half.gguf").write_bytes(shipped.model().read_bytes()[:10_000])
    assert "a/b:half" in aisp("models", "list").stdout
