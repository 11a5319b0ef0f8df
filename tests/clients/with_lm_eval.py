"""lm-eval: log-likelihoods, and a task of our own, which scores as with transformers on the same weights."""

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from checks import MODEL, URL, check
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

BOOK = Path(__file__).parents[2] / "scheduler" / "data" / "alice.txt"
SOURCE = Path(os.environ["CAROUSEL_TOKENIZER"])
QUESTIONS = 40
APART = 2
"""As many may be decided otherwise: two continuations may be as likely but for rounding."""
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{passage}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{right}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "Repeat this: {{passage}}",
    "doc_to_target": "{{passage}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def questions() -> list[dict[str, Any]]:
    """Which of four continuations follows a passage; the others are of other passages."""
    words = BOOK.read_text().split()
    rng = random.Random(0)
    starts = [rng.randrange(len(words) - 40) for _ in range(QUESTIONS)]
    follow = [" " + " ".join(words[start + 30 : start + 38]) for start in starts]
    made = []
    for number, start in enumerate(starts):
        choices = [follow[number], *rng.sample([other for other in follow if other != follow[number]], 3)]
        rng.shuffle(choices)
        passage = " ".join(words[start : start + 30])
        made.append({"passage": passage, "choices": choices, "right": choices.index(follow[number])})
    return made


def write_tasks(folder: Path) -> TaskManager:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions()))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    dataset = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    for name, task in (("alice_choice", CHOICE), ("alice_repeat", GENERATE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **dataset, **task}))
    return TaskManager(include_path=str(folder), include_defaults=False)


def write_weights(folder: Path) -> None:
    """The GGUF file's weights in float32, as safetensors."""
    (file,) = SOURCE.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(SOURCE, gguf_file=file.name, dtype="float32")
    vars(model)["hf_quantizer"] = None  # transformers takes it for quantized still, and would not save it
    model.config.quantization_config = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SOURCE).save_pretrained(folder)


def evaluate(model: str, arguments: dict[str, Any], task: str, tasks: TaskManager, **more: Any) -> Any:
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, **more
    )
    return found["results"][task], sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def try_loglikelihoods() -> None:
    model = LocalCompletionsAPI(**SERVED)
    pairs = [("The capital of France is", " Paris"), ("The capital of France is", " a potato")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    (likely, _), (unlikely, _) = model.loglikelihood(asked)
    check("loglikelihood orders the answers", 0 > likely > unlikely, (likely, unlikely))


def try_choices(folder: Path, tasks: TaskManager) -> None:
    write_weights(folder / "float32")
    ours, our_samples = evaluate("local-completions", SERVED, "alice_choice", tasks)
    local = {"pretrained": str(folder / "float32"), "dtype": "float32", "device": "cpu"}
    theirs, their_samples = evaluate("hf", local, "alice_choice", tasks, batch_size=4)
    apart = sum(one["acc"] != other["acc"] for one, other in zip(our_samples, their_samples, strict=True))
    pairs = zip(numbers(our_samples), numbers(their_samples), strict=True)
    distance = max(abs(one - other) for one, other in pairs)
    scores = [result[name] for result in (ours, theirs) for name in ("acc,none", "acc_norm,none")]
    what = "acc {:.3f} and acc_norm {:.3f} of 40 choices; with transformers {:.3f} and {:.3f}".format(*scores)
    check(f"{what}; {apart} apart", len(our_samples) == QUESTIONS and apart <= APART, apart)
    check(f"log-likelihoods are within {distance:.1g}", distance < 0.01, distance)


def numbers(samples: list[dict[str, Any]]) -> list[float]:
    return [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]


def try_chat(tasks: TaskManager) -> None:
    served = {"model": MODEL, "base_url": f"{URL}/v1/chat/completions", "max_retries": 1, "num_concurrent": 4}
    found, samples = evaluate(
        "local-chat-completions", served, "alice_repeat", tasks, apply_chat_template=True, limit=8
    )
    answers = [sample["filtered_resps"][0] for sample in samples]
    check("local-chat-completions: 8 answers", len(answers) == 8 and all(answers), (found, answers))


SERVED = {
    "model": MODEL,
    "base_url": f"{URL}/v1/completions",
    "tokenizer": str(SOURCE),
    "tokenizer_backend": "huggingface",
    "num_concurrent": 4,
    "max_retries": 1,
}
torch.set_num_threads(2)
with tempfile.TemporaryDirectory() as name:
    manager = write_tasks(Path(name))
    try_loglikelihoods()
    try_choices(Path(name), manager)
    try_chat(manager)
