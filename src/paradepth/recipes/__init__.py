"""Recipes: functions that return the options of a run; each docstring states the expected time and accuracy."""

from paradepth.recipes.bert import bert_c4, bert_mini, bert_paraformer
from paradepth.recipes.glue import glue_from_scratch
from paradepth.recipes.images import (
    cifar10_paraformer,
    cifar10_vit,
    cifar100_paraformer,
    cifar100_vit,
    digits_paraformer,
    fashion_paraformer,
    fashion_vit,
    paraformer_authors_224,
)
from paradepth.recipes.language import (
    gpt2_openwebtext,
    shakespeare_branch_sums,
    shakespeare_char,
    shakespeare_gpt,
    shakespeare_gpt2,
    shakespeare_mgrit,
    shakespeare_mgrit_control,
    shakespeare_paraformer,
)
from paradepth.recipes.registry import RECIPES, get_recipe, register_recipe
from paradepth.recipes.synthetic import copying, recall, sorting
from paradepth.recipes.tagging import ewt_mgrit, ewt_paraformer, ewt_tagger, mc_gum_published
from paradepth.recipes.translation import (
    multi30k_mgrit,
    multi30k_paraformer,
    multi30k_transformer,
    opus_published,
)

for _recipe in (
    bert_mini,
    bert_paraformer,
    bert_c4,
    glue_from_scratch,
    digits_paraformer,
    fashion_paraformer,
    fashion_vit,
    cifar10_paraformer,
    cifar10_vit,
    cifar100_paraformer,
    cifar100_vit,
    paraformer_authors_224,
    shakespeare_gpt,
    shakespeare_mgrit,
    shakespeare_mgrit_control,
    shakespeare_branch_sums,
    shakespeare_char,
    shakespeare_paraformer,
    shakespeare_gpt2,
    gpt2_openwebtext,
    recall,
    copying,
    sorting,
    multi30k_transformer,
    multi30k_paraformer,
    multi30k_mgrit,
    opus_published,
    ewt_tagger,
    ewt_paraformer,
    ewt_mgrit,
    mc_gum_published,
):
    register_recipe(_recipe)

__all__ = ["RECIPES", "get_recipe", "register_recipe"]
