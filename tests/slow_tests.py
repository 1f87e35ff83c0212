"""The test files that `make quick` leaves out: they train, start many processes, or compare whole networks.

conftest.py marks their tests `slow`; `make test` runs them all. `make quick` ends with the tests that took it more than
two seconds: the file of such a test belongs here, or the test into a file of its own that does.
"""

from __future__ import annotations

# Relative to tests/.
SLOW_FILES = frozenset(
    {
        "apps/cli/test_device_pool.py",
        "apps/cli/test_evaluate.py",
        "apps/cli/test_reruns.py",
        "apps/demo/test_demo.py",
        "apps/server/test_clients.py",
        "apps/server/test_fuzz.py",
        "apps/server/test_load.py",
        "apps/server/test_native.py",
        "benchmarks/test_benchmarks.py",
        "benchmarks/test_rerank.py",
        "capfilt/test_bootstrap.py",
        "capfilt/test_hostile.py",
        "capfilt/test_refilter.py",
        "capfilt/test_remote_captioner.py",
        "checkpoints/test_against_reference.py",
        "checkpoints/test_blip2.py",
        "checkpoints/test_clip_resnet.py",
        "checkpoints/test_florence.py",
        "checkpoints/test_llava.py",
        "checkpoints/test_official.py",
        "checkpoints/test_paligemma.py",
        "checkpoints/test_siglip.py",
        "checkpoints/test_wrong_types.py",
        "data/images/test_preprocess.py",
        "data/images/test_reader.py",
        "evaluation/test_evaluate.py",
        "inference/test_chat.py",
        "inference/test_florence.py",
        "inference/test_generation_config.py",
        "inference/test_load.py",
        "inference/test_malloc.py",
        "inference/test_model.py",
        "inference/test_paligemma.py",
        "nn/test_init.py",
        "objectives/test_distributed.py",
        "recipes/test_capfilt_experiment.py",
        "recipes/test_nano.py",
        "tasks/test_region_parser.py",
        "test_docs.py",
        "test_entry.py",
        "test_readme.py",
        "training/test_calibration.py",
        "training/test_fsdp.py",
        "training/test_learning_boxes.py",
        "training/test_recipes.py",
        "training/test_trainer.py",
    }
)
