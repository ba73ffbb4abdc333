"""What the licence of a base model asks of those who use or pass on weights tuned from it. Not legal advice."""

from __future__ import annotations

import re
from typing import NamedTuple


class Licence(NamedTuple):
    """`tag` and `name` are the Hub's `license` and `license_name`; `text` is Markdown for a model card."""

    tag: str
    name: str
    text: str


def licence_of(base: str, model_type: str = "") -> Licence:
    """The licence of a base model by its name, `meta-llama/Llama-3.2-11B-Vision-Instruct` say.

    A name that says nothing (a folder) leaves the `model_type` of its configuration, which tells the architecture and
    not whose weights they are: then the text says "if". Else UNKNOWN.
    """
    folded = base.lower()
    for pattern, licence in BY_NAME:
        if re.search(pattern, folded):
            return licence
    if model_type in BY_TYPE:
        maker, licence = BY_TYPE[model_type]
        condition = f"The base is of the type `{model_type}`. If its weights come from {maker}, this holds:"
        return UNKNOWN._replace(text=f"{UNKNOWN.text}\n{condition}\n\n{licence.text}")
    return UNKNOWN


LLAMA_32 = Licence(
    "llama3.2",
    "",
    """**Built with Llama.** Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, \
Inc. All Rights Reserved. These weights are a derivative and stand under the same agreement. Whoever passes them on, \
or offers a product or service with them, must:

- give a copy of the [agreement](https://www.llama.com/llama3_2/license) with them, and keep the sentence above in a \
text file named "Notice";
- show "Built with Llama" prominently on a related website, interface or product documentation;
- begin the name of the model with "Llama";
- keep to the [Acceptable Use Policy](https://www.llama.com/llama3_2/use-policy), which among other things forbids the \
unauthorised or unlicensed practice of a medical or health profession;
- ask Meta for a licence of their own if their products had more than 700 million monthly active users when Llama 3.2 \
was released.

**European Union.** For the multimodal models of Llama 3.2, which this base is one of, the policy grants no rights to \
individuals who live in the European Union or companies whose principal place of business is there. End users of a \
product or service that contains such a model are not affected.
""",
)
LLAMA = Licence(
    "other",
    "llama-community",
    """The base is a Llama model under one of Meta's Community License agreements, and these weights are a derivative. \
Those agreements ask for a copy of the agreement, the notice "Built with Llama" (as the version has it), a model name \
that begins with "Llama", and keeping to the Acceptable Use Policy; the policies of the multimodal versions since 3.2 \
grant no rights to individuals and companies at home in the European Union. Read the agreement of this version: \
<https://www.llama.com/llama-downloads>.
""",
)
GEMMA = Licence(
    "gemma",
    "",
    """Gemma is provided under and subject to the Gemma Terms of Use found at <https://ai.google.dev/gemma/terms>. \
These weights are a Model Derivative under those terms. Whoever passes them on must bind their recipients to the use \
restrictions of section 3.2 (the [Prohibited Use Policy](https://ai.google.dev/gemma/prohibited_use_policy), which \
among other things forbids the unlicensed practice of medicine), give a copy of the terms, say prominently that the \
files were modified, and keep the first sentence of this section in a text file named "Notice".
""",
)
HEALTH_AI = Licence(
    "other",
    "health-ai-developer-foundations",
    """The base is subject to the Health AI Developer Foundations Terms of Use, \
<https://developers.google.com/health-ai-developer-foundations/terms>, and these weights are derived from it. Read \
there what they ask for clinical use and for passing weights on.
""",
)
QWEN_RESEARCH = Licence(
    "other",
    "qwen-research",
    """The base is under the Qwen Research License, which allows research and evaluation but **no commercial use** \
without a licence from Alibaba Cloud. It asks those who pass on derivatives for a copy of the agreement, a notice of \
the changes, and the words "Built with Qwen" or "Improved using Qwen" in the product documentation. Read it in the \
base's repository.
""",
)
QWEN = Licence(
    "other",
    "qwen",
    """The base is under the Qwen License Agreement: products with more than 100 million monthly active users need a \
licence from Alibaba Cloud, and those who pass on derivatives give a copy of the agreement and a notice of the \
changes. Read it in the base's repository.
""",
)
APACHE = Licence(
    "apache-2.0",
    "",
    """The base is under the Apache License 2.0. Whoever passes these weights on gives a copy of that licence, keeps \
the base's notices, and says that the weights were changed, as this card does.
""",
)
UNKNOWN = Licence(
    "other",
    "see-base-model",
    """See the licence of the base model: it applies to these weights too. Neither the tuning nor this card grants \
more than it does.
""",
)
# The first that fits. Qwen2.5-VL differs by size: 3B research, 72B Qwen, 7B and 32B Apache; so did Qwen2-VL for 72B.
BY_NAME = (
    (r"llama-?3[._]2.*vision|llama-?3[._]2-(11b|90b)", LLAMA_32),
    (r"(^|[/_-])llama-?[34]", LLAMA),
    (r"medgemma", HEALTH_AI),
    (r"gemma-?4", APACHE),
    (r"gemma", GEMMA),
    (r"qwen2[._]5-vl-3b", QWEN_RESEARCH),
    (r"qwen2([._]5)?-vl-72b", QWEN),
    (r"qwen2([._]5)?-vl-(2b|7b|32b)|qwen3-vl", APACHE),
)
BY_TYPE = {
    "mllama": ("Meta's Llama 3.2 Vision", LLAMA_32),
    "llama4": ("Meta's Llama 4", LLAMA),
    "gemma3": ("Google's Gemma 3", GEMMA),
    "paligemma": ("Google's PaliGemma", GEMMA),
    "qwen3_vl": ("Qwen3-VL", APACHE),
}
