"""Frame choice and sizes against the two reference libraries, resize against torchvision, images, windows."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data.records import Media
from data.video import (
    ImageSettings,
    MediaError,
    VideoSettings,
    choose_frames,
    frame_size,
    image_size,
    plan_video,
    read_image,
    read_video,
    resize_frame,
    smart_resize,
)
from tests.data.clips import make_clip, numbered, read_number


def test_smart_resize_equals_both_libraries():
    from qwen_vl_utils.vision_process import smart_resize as of_qwen
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as of_transformers

    compared = 0
    for height in (28, 45, 97, 240, 359, 720, 1081, 4000):
        for width in (31, 64, 176, 641, 1280, 3999):
            for factor in (28, 32):
                for low, high in ((4096, 65536), (3136, 262144), (262144, 262144), (1, 10_000_000)):
                    if max(height, width) < factor or min(height, width) < factor:
                        continue
                    ours = smart_resize(height, width, factor, low, high)
                    theirs = of_transformers(height, width, factor, low, high)
                    assert ours == theirs
                    if 0 not in of_qwen(height, width, factor, low, high):
                        assert ours == of_qwen(height, width, factor, low, high)
                    compared += 1
    assert compared > 250
    # By hand: 1280x720 under 65536 pixels: beta = 3.75, 720/3.75 = 192 = 6*32, 1280/3.75 = 341.3 -> 320.
    assert smart_resize(720, 1280, 32, 4096, 65536) == (192, 320)
    with pytest.raises(ValueError, match="200:1"):
        smart_resize(1, 201, 28, 1, 10_000)


def test_frame_count_equals_qwen_vl_utils():
    from qwen_vl_utils.vision_process import smart_nframes

    for total in (2, 3, 5, 17, 100, 299, 300, 1801, 9000):
        for source_fps in (10.0, 23.976, 25.0, 29.97, 30.0):
            for fps, low, high in ((2.0, 4, 128), (1.0, 4, 768), (8.0, 6, 33)):
                settings = VideoSettings(fps=fps, min_frames=low, max_frames=high)
                chosen = choose_frames(np.arange(total) / source_fps, source_fps, settings, True)
                element = {"fps": fps, "min_frames": low, "max_frames": min(high, total)}
                assert len(chosen) == smart_nframes(element, total, source_fps)
                assert (chosen[0], chosen[-1]) == (0, total - 1)


def test_frame_choice_equals_the_qwen3_processor():
    """Same count, same indices as Hugging Face's sample_frames, for counts it makes even by itself."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    processor = Qwen3VLVideoProcessor()
    for total, source_fps in ((300, 30.0), (250, 25.0), (1800, 30.0), (96, 24.0)):
        metadata = VideoMetadata(total_num_frames=total, fps=source_fps, frames_indices=None)
        theirs = processor.sample_frames(metadata, fps=2)
        ours = choose_frames(np.arange(total) / source_fps, source_fps, VideoSettings(fps=2), True)
        assert ours.tolist() == theirs.tolist()


def test_long_clips_share_the_total_budget():
    """fetch_video's rule: per frame at most total / frames * 2, at least 1.05 * min_pixels."""
    settings = VideoSettings(min_pixels=3136, max_pixels=262144, total_pixels=4_000_000, factor=28)
    # 100 frames: 80,000 pixels each. 1280x720: beta = sqrt(921600 / 80000) = 3.394; 212.1 -> 196, 377.1 -> 364.
    assert frame_size(720, 1280, 100, settings) == (196, 364)
    # 10 frames: 800,000 each, so max_pixels 262,144 rules: beta = 1.875; 384 -> 364, 682.7 -> 672.
    assert frame_size(720, 1280, 10, settings) == (364, 672)
    # 10,000 frames: 800 each is under 1.05 * 3136 = 3292: beta = 16.73; 43.0 -> 28, 76.5 -> 56.
    assert frame_size(720, 1280, 10_000, settings) == (28, 56)


def test_exact_resize_is_torchvisions_and_native_is_near():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as v1
    from torchvision.transforms.v2 import functional as v2

    rng = np.random.default_rng(0)
    for shape, size in (((90, 122), (64, 96)), ((48, 64), (96, 160)), ((359, 641), (196, 364))):
        clip = rng.integers(0, 256, (3, *shape, 3), dtype=np.uint8)
        batch = torch.from_numpy(clip).permute(0, 3, 1, 2)
        exact = np.stack([resize_frame(frame, *size, "exact") for frame in clip])
        reference = v1.resize(batch, list(size), InterpolationMode.BICUBIC, antialias=True)
        np.testing.assert_array_equal(exact, reference.numpy())
        native = np.stack([resize_frame(frame, *size, "native") for frame in clip])
        np.testing.assert_array_equal(
            native, v2.resize(batch, list(size), InterpolationMode.BICUBIC, antialias=True).numpy()
        )
        difference = np.abs(native.astype(int) - exact)
        assert difference.mean() < 1  # noise is the worst case for rounding


def test_pixels_equal_the_reference_recipe(tmp_path):
    """qwen-vl-utils with decord: the same frames, bit for bit."""
    pytest.importorskip("decord")
    from qwen_vl_utils import vision_process

    path = make_clip(tmp_path / "a.mp4", frames=41, height=90, width=122)
    element = {"video": path, "fps": 5.0, "min_frames": 4, "max_frames": 32, "min_pixels": 4096, "max_pixels": 9216}
    video, metadata, _ = vision_process._read_video_decord(element)
    batch = vision_process.transforms.functional.resize(
        video, [64, 96], interpolation=vision_process.InterpolationMode.BICUBIC, antialias=True
    ).float()  # fetch_video's own call; 122x90 under 9216 pixels is 96x64: beta 1.0914, 82.5 -> 64, 111.8 -> 96
    settings = VideoSettings(fps=5.0, min_frames=4, max_frames=32, min_pixels=4096, max_pixels=9216)
    frames = read_video(Media("video", path=path), settings)
    assert frames.indices.tolist() == metadata["frames_indices"]
    assert batch.shape == frames.pixels.shape
    np.testing.assert_array_equal(frames.pixels.astype(np.float32), batch.numpy())


@pytest.mark.parametrize(
    "window, inside",
    [
        ((0.5, 1.0), range(10, 20)),
        ((None, 0.3), range(0, 6)),
        ((1.8, None), range(36, 40)),
        ((0.51, 0.99), range(11, 20)),
    ],
)
def test_windows_are_exact(tmp_path, window, inside):
    """20 fps, every frame asked for: exactly the frames with start <= time < end."""
    path = make_clip(tmp_path / "a.mp4")
    media = Media("video", path=path, start_s=window[0], end_s=window[1])
    frames = read_video(media, VideoSettings(fps=20, min_frames=2, min_pixels=12288))
    expected = list(inside)[: len(inside) // 2 * 2]
    if len(inside) % 2:  # an odd count loses one, evenly spread: ends stay
        assert (frames.indices[0], frames.indices[-1], len(frames.indices)) == (inside[0], inside[-1], len(expected))
    else:
        assert frames.indices.tolist() == expected
    assert [read_number(picture) for picture in frames.pixels] == frames.indices.tolist()
    np.testing.assert_allclose(frames.timestamps_s, frames.indices / 20)


def test_windows_between_frames_and_outside(tmp_path):
    path = make_clip(tmp_path / "a.mp4")
    settings = VideoSettings(min_pixels=12288)
    between = read_video(Media("video", path=path, start_s=0.51, end_s=0.52), settings)
    assert between.indices.tolist() == [10, 10]  # the picture on screen from 0.50 to 0.55 s
    for start, end in ((2.0, 3.0), (5.0, None), (0.5, 0.5)):
        with pytest.raises(MediaError, match="outside the clip"):
            read_video(Media("video", path=path, start_s=start, end_s=end), settings)


def test_grid_sampling_nests(tmp_path):
    """Every 1/fps second from the start: coarser rates and windows are subsets, which even spacing does not give."""
    path = make_clip(tmp_path / "a.mp4", frames=80)
    read = {fps: plan_video(Media("video", path=path), VideoSettings(fps=fps, sampling="grid")) for fps in (1, 2, 4)}
    assert read[4].indices.tolist() == list(range(0, 80, 5))
    assert set(read[2].indices) <= set(read[4].indices) and set(read[1].indices) <= set(read[2].indices)
    window = plan_video(Media("video", path=path, start_s=1.0, end_s=3.0), VideoSettings(fps=2, sampling="grid"))
    assert window.timestamps_s.tolist() == [1.0, 1.5, 2.0, 2.5]


def test_plan_tells_what_read_will_give(tmp_path):
    path = make_clip(tmp_path / "a.mp4", height=90, width=122, rotation=90)
    media, settings = Media("video", path=path), VideoSettings(fps=5, max_pixels=8192)
    plan, frames = plan_video(media, settings), read_video(media, settings)
    assert frames.pixels.shape == (len(plan.indices), 3, plan.height, plan.width)
    assert plan.height > plan.width  # a phone held upright
    np.testing.assert_array_equal(plan.timestamps_s, frames.timestamps_s)


def test_list_of_frame_images(tmp_path):
    paths = []
    for number in range(10):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(numbered(number * 20, 96, 128)).save(paths[-1])
    media = Media("video", frames=tuple(paths), fps=4.0)  # 10 frames at 4 per second: 2.5 s
    frames = read_video(media, VideoSettings(fps=2, min_pixels=12288))
    assert frames.indices.tolist() == [0, 3, 6, 9]  # 5 frames, made even; linspace(0, 9, 4)
    assert [read_number(picture) for picture in frames.pixels] == [0, 60, 120, 180]
    assert frames.timestamps_s.tolist() == [0, 0.75, 1.5, 2.25]
    with pytest.raises(MediaError, match=r"missing\.png: does not exist"):
        read_video(Media("video", frames=(*paths[:-1], str(tmp_path / "missing.png"))), VideoSettings())


def test_images(tmp_path):
    picture = numbered(165, 96, 128)
    settings = ImageSettings(min_pixels=1024, max_pixels=1_000_000, factor=32)
    path = str(tmp_path / "a.png")
    Image.fromarray(picture).save(path)
    np.testing.assert_array_equal(read_image(Media("image", path=path), settings), picture.transpose(2, 0, 1))
    with open(path, "rb") as file:
        data = file.read()
    np.testing.assert_array_equal(read_image(Media("image", data=data), settings), picture.transpose(2, 0, 1))
    # An orientation tag turns the picture; a transparent one is laid on white; 16-bit grey keeps its slope.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(path, exif=exif)
    upright = read_image(Media("image", path=path), settings)
    assert image_size(Media("image", path=path), settings) == upright.shape[1:] == (128, 96)
    np.testing.assert_array_equal(upright, np.rot90(picture, -1).transpose(2, 0, 1))
    Image.new("RGBA", (64, 32), (255, 0, 0, 0)).save(path)
    assert read_image(Media("image", path=path), settings).min() == 255
    Image.fromarray(np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)).save(path)
    grey = read_image(Media("image", path=path), settings)
    assert grey[0, 0, 0] == 0 and grey[0, -1, -1] == 255 and 120 < grey[0, 16, 0] < 135


def test_bad_images_are_media_errors(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(numbered(3, 96, 128)).save(buffer, "PNG")
    for name, data in {"zero": b"", "garbage": b"x" * 500, "cut": buffer.getvalue()[:200]}.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        with pytest.raises(MediaError) as caught:
            read_image(Media("image", path=str(path)), ImageSettings())
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0},
        {"max_frames": 2},
        {"min_pixels": 9, "max_pixels": 8},
        {"resize": "fast"},
        {"backend": "cv2"},
        {"sampling": "x"},
    ],
)
def test_wrong_settings_name_the_flag(wrong):
    with pytest.raises(ValueError, match="--"):
        VideoSettings(**wrong)
