"""Makes a cache of the smallest real models that RadEval's metrics accept: `build/radeval/bin/python THIS FOLDER <PAIRS`.

Architectures, file formats and label sets are those of the published models; the weights are drawn, so that the values mean
nothing, but differ from text to text. The judges of GREEN and CRIMSON are taught to answer about PAIRS, a JSON list of reference
and answer, in the form that they must have; GREEN's writes nothing of use where the answer is "No". The folder is one that
RadEval fills itself where there is a network: `huggingface/` is HF_HOME, and the rest XDG_CACHE_HOME and NLTK_DATA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import radeval
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

sys.modules["RadEval"] = radeval
COMMIT = "0" * 40
TEXT = """no acute finding findings process cardiopulmonary pneumothorax pleural effusion effusions nodule edema
consolidation atelectasis cardiomegaly heart size is normal lungs are clear there a of the in left right upper lower lobe small
mild moderate large severe bilateral with and"""
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 520,
    "initializer_range": 0.4,
}
ENTITIES = ("Anatomy::definitely present", "Observation::definitely present", "Observation::definitely absent")
RELATIONS = ("modify", "located_at", "suggestive_of")


def made(hub: Path, name: str) -> Path:
    """The folder of a model in the cache of the hub."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def wordpieces(folder: Path) -> int:
    """A tokenizer of whole words and letters; returns its size."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *TEXT.split(),
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    pieces = list(dict.fromkeys(pieces))
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512).save_pretrained(folder)
    return len(pieces)


def chexbert(cache: Path) -> None:
    base = made(cache / "huggingface" / "hub", "bert-base-uncased")
    config = BertConfig(vocab_size=wordpieces(base), **TINY)
    config.save_pretrained(base)
    state = {f"bert.{name}": value for name, value in BertModel(config).state_dict().items()}
    for head in range(14):
        layer = torch.nn.Linear(config.hidden_size, 2 if head == 13 else 4)
        state |= {f"linear_heads.{head}.{name}": value for name, value in layer.state_dict().items()}
    scorers = made(cache / "chexbert", "StanfordAIMI/RRG_scorers")
    torch.save(
        {"model_state_dict": {f"module.{name}": value for name, value in state.items()}}, scorers / "chexbert.pth"
    )


def radgraph(cache: Path, kind: str) -> None:
    from radeval.metrics.radgraph._vendor.core import RadGraph

    encoder = made(cache / "huggingface" / "hub", "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext")
    config = BertConfig(vocab_size=wordpieces(encoder), **TINY)
    BertModel(config).save_pretrained(encoder)
    config.save_pretrained(encoder)
    name = "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext"
    folder = cache / "radgraph" / "0.1.18" / kind
    (folder / "vocabulary").mkdir(parents=True)
    (folder / "vocabulary" / "non_padded_namespaces.txt").write_text("*tags\n*labels\n")
    (folder / "vocabulary" / f"{kind}__ner_labels.txt").write_text("\n".join(["", *ENTITIES]) + "\n")
    (folder / "vocabulary" / f"{kind}__relation_labels.txt").write_text("\n".join(RELATIONS) + "\n")
    tree = {
        "dataset_reader": {"max_span_width": 3, "token_indexers": {"bert": {"model_name": name, "max_length": 512}}},
        "model": {
            "type": "dygie",
            "embedder": {"token_embedders": {"bert": {"model_name": name, "max_length": 512}}},
            "initializer": {},
            "module_initializer": {},
            "feature_size": 4,
            "max_span_width": 3,
            "target_task": "relation",
            "feedforward_params": {"num_layers": 1, "hidden_dims": 16, "dropout": 0.0},
            "loss_weights": {"coref": 0.0, "ner": 0.2, "relation": 1.0, "events": 0.0},
            "modules": {
                "coref": {"spans_per_word": 0.3, "max_antecedents": 10, "coref_prop": 0},
                "ner": {},
                "relation": {"spans_per_word": 0.5},
                "events": {
                    "trigger_spans_per_word": 0.3,
                    "argument_spans_per_word": 0.8,
                    "loss_weights": {"trigger": 1, "arguments": 1},
                },
            },
        },
    }
    (folder / "config.json").write_text(json.dumps(tree))
    load = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda model, *_, **__: torch.save(model.state_dict(), folder / "weights.th")
    torch.save({}, folder / "weights.th")
    try:
        RadGraph(model_type=kind)
    finally:
        torch.nn.Module.load_state_dict = load


def ratescore(cache: Path) -> None:
    hub = cache / "huggingface" / "hub"
    kinds = ("ABNORMALITY", "NON-ABNORMALITY", "DISEASE", "NON-DISEASE", "ANATOMY")
    labels = ["O", *(f"{part}-{kind}" for kind in kinds for part in "BI")]
    for name, model, more in (
        (
            "Angelakeke/RaTE-NER-Deberta",
            BertForTokenClassification,
            {"id2label": dict(enumerate(labels)), "num_hidden_layers": 0},
        ),
        ("FremyCompany/BioLORD-2023-C", BertModel, {}),
    ):
        folder = made(hub, name)
        more |= {"label2id": {label: number for number, label in enumerate(labels)}} if more else {}
        model(BertConfig(vocab_size=wordpieces(folder), **(TINY | more))).save_pretrained(folder)


def srrbert(cache: Path) -> None:
    hub = cache / "huggingface" / "hub"
    mapping = Path(radeval.__file__).parent / "metrics" / "SRRBert" / "leaves_with_statuses_mapping.json"
    size = wordpieces(made(hub, "microsoft/BiomedVLP-CXR-BERT-general"))
    config = BertConfig(vocab_size=size, num_labels=len(json.loads(mapping.read_text())), **TINY)
    BertForSequenceClassification(config).save_pretrained(made(hub, "StanfordAIMI/SRR-BERT-Leaves-with-Statuses"))
    punkt = cache / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for file in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / file).write_text("")


def roberta(cache: Path) -> None:
    """The encoder of RadCliQ's BERTScore."""
    from tokenizers import ByteLevelBPETokenizer

    folder = made(cache / "huggingface" / "hub", "distilroberta-base")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], 400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save_model(str(folder))
    config = RobertaConfig(vocab_size=400, pad_token_id=1, **(TINY | {"num_hidden_layers": 6}))
    RobertaModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, model_max_length=512).save_pretrained(folder)


def judge(
    folder: Path, texts: list[str], pieces: list[str], model: Callable[[int], PreTrainedModel], chat: str
) -> None:
    """Save a judge with drawn weights, whose words are those of `texts`, and further the `pieces` of its answers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.Whitespace()
    found = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    words = list(dict.fromkeys(["<unk>", "<s>", "</s>", *found, *pieces]))
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.model_max_length, fast.chat_template = 4096, chat
    fast.save_pretrained(folder)
    made = model(len(words))
    made.generation_config.max_new_tokens, made.generation_config.eos_token_id = 32, 2
    made.save_pretrained(folder)


def taught(model: Any, tokenizer: Any, prompts: list[str], answers: list[list[str]]) -> Any:
    """Fit the last layer (least squares) so that each prompt is answered with its pieces, and then ends."""
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].detach().double()))
    states, wanted = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        asked = tokenizer(prompt).input_ids
        said = tokenizer.convert_tokens_to_ids([*answer, "</s>"])
        seen.clear()
        with torch.inference_mode():
            model(input_ids=torch.tensor([[*asked, *said[:-1]]]))
        states.append(seen[-1][len(asked) - 1 :])
        wanted += said
    hook.remove()
    state = torch.cat(states)
    targets = torch.zeros(len(wanted), model.lm_head.out_features, dtype=torch.double)
    targets[range(len(wanted)), wanted] = 20.0
    gram = state.T @ state
    fitted = torch.linalg.solve(gram + 1e-6 * gram.trace() * torch.eye(len(gram)), state.T @ targets)
    model.lm_head.weight.data = fitted.T.to(model.lm_head.weight.dtype)
    return model


JUDGE = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
JUDGE |= {"tie_word_embeddings": False, "initializer_range": 0.4, "max_position_embeddings": 4096}


def green(cache: Path, pairs: list[tuple[str, str]]) -> None:
    from radeval.metrics.green_score.green import GREEN
    from radeval.metrics.green_score.utils import make_prompt

    name = "StanfordAIMI/GREEN-radllama2-7b"
    folder = made(cache / "huggingface" / "hub", name)
    errors = "[Clinically Significant Errors]:\n(a) False report of a finding in the candidate: "
    matched, counts = "\n\n[Matched Findings]:\n", ["0.", "1.", "2."]
    asked = [make_prompt(*pair) for pair in pairs]
    pieces = [errors, matched, *counts, "?"]
    judge(
        folder,
        [*asked, "<|assistant|>", "<|user|>"],
        pieces,
        lambda size: LlamaForCausalLM(LlamaConfig(vocab_size=size, **JUDGE)),
        "",
    )
    judging = GREEN(name, cpu=True)
    prompts = [
        judging.tokenizer.apply_chat_template(
            [{"from": "human", "value": each}, {"from": "gpt", "value": ""}], tokenize=False, add_generation_prompt=True
        )
        for each in asked
    ]
    answers = [
        [errors, counts[place % 3], matched, counts[1 + place // 3 % 2]] if said != "No" else ["?"]
        for place, (_, said) in enumerate(pairs)
    ]
    taught(judging.model, judging.tokenizer, prompts, answers).save_pretrained(folder)


def crimson(cache: Path, pairs: list[tuple[str, str]]) -> None:
    from radeval.metrics.crimson.crimson import _SYSTEM_MSG, CRIMSON

    folder = made(cache / "huggingface" / "hub", CRIMSON.DEFAULT_HF_MODEL)
    first = '{"reference_findings": [{"id": "R1", "clinical_significance": "'
    second = '"}], "predicted_findings": [{"id": "P1", "clinical_significance": "'
    levels = ["urgent", "actionable_not_urgent", "not_actionable_not_urgent"]
    ends = [
        '"}], "matched_findings": [{"ref_id": "R1", "pred_id": "P1"}], "errors": {"false_findings": []}}',
        '"}], "matched_findings": [], "errors": {"false_findings": ["P1"], "missing_findings": ["R1"]}}',
    ]
    asking = CRIMSON.__new__(CRIMSON)
    asking.provider, asking.model_name = "hf", CRIMSON.DEFAULT_HF_MODEL
    chats = [
        [
            {"role": "system", "content": _SYSTEM_MSG},
            {"role": "user", "content": asking._build_evaluation_prompt(*pair)},
        ]
        for pair in pairs
    ]
    sizes = JUDGE | {"head_dim": 64, "num_key_value_heads": 4, "sliding_window": 4096}
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes = sides | {"image_size": 28, "patch_size": 14}
    judge(
        folder,
        [message["content"] for chat in chats for message in chat],
        [first, second, *levels, *ends],
        lambda size: Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=sizes | {"vocab_size": size},
                vision_config=eyes,
                mm_tokens_per_image=4,
                tie_word_embeddings=False,
            )
        ),
        "{% for message in messages %}{{ message['content'] }} {% endfor %}",
    )
    judging = CRIMSON(provider="hf")
    tokenizer = judging.pipe.tokenizer
    prompts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in chats]
    answers = [
        [first, levels[place % 3], second, levels[place // 2 % 3], ends[place % 2]] for place in range(len(pairs))
    ]
    taught(judging.pipe.model, tokenizer, prompts, answers).save_pretrained(folder)


if __name__ == "__main__":
    torch.manual_seed(0)
    cache = Path(sys.argv[1])
    chexbert(cache)
    ratescore(cache)
    srrbert(cache)
    roberta(cache)
    pairs = json.load(sys.stdin)
    green(cache, pairs)
    crimson(cache, pairs)
    for kind in ("radgraph", "radgraph-xl"):
        radgraph(cache, kind)
