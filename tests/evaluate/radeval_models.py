"""Makes a cache of the smallest real models that RadEval's metrics accept: `build/radeval/bin/python THIS FOLDER`.

Architectures, file formats and label sets are those of the published models; the weights are drawn, so that the values mean
nothing, but differ from text to text. The folder is one that RadEval fills itself where there is a network: `huggingface/` is
HF_HOME, and the rest XDG_CACHE_HOME and NLTK_DATA.
"""

from __future__ import annotations

import json
import sys
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
    LlamaConfig,
    LlamaForCausalLM,
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


def green(cache: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = made(cache / "huggingface" / "hub", "StanfordAIMI/GREEN-radllama2-7b")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=4096, **sizes)).save_pretrained(
        folder
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    cache = Path(sys.argv[1])
    chexbert(cache)
    ratescore(cache)
    srrbert(cache)
    roberta(cache)
    green(cache)
    for kind in ("radgraph", "radgraph-xl"):
        radgraph(cache, kind)
