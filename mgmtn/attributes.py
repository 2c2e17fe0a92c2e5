"""The 40 CelebA attributes and the eight facial groups that MGMTN predicts them from, as data.

Names are CelebA's in lower case, in CelebA's order; the attribute's index is its bit in the table's `labels` column.
The partition is ours (the paper names the groups, not their members); each attribute belongs to one group.
To change the partition, edit `_GROUP_OF`: checkpoints carry the partition that they were trained with.
"""

from typing import Final

GROUPS: Final = ("mouth", "ear", "lower_face", "cheeks", "nose", "eyes", "hair", "object")

# CelebA's order. CelebA's own spelling differs from ours in case, and in its first name, `5_o_Clock_Shadow`.
_GROUP_OF: Final[dict[str, str]] = {
    "five_o_clock_shadow": "lower_face",
    "arched_eyebrows": "eyes",
    "attractive": "object",
    "bags_under_eyes": "eyes",
    "bald": "hair",
    "bangs": "hair",
    "big_lips": "mouth",
    "big_nose": "nose",
    "black_hair": "hair",
    "blond_hair": "hair",
    "blurry": "object",
    "brown_hair": "hair",
    "bushy_eyebrows": "eyes",
    "chubby": "object",
    "double_chin": "lower_face",
    "eyeglasses": "eyes",
    "goatee": "lower_face",
    "gray_hair": "hair",
    "heavy_makeup": "object",
    "high_cheekbones": "cheeks",
    "male": "object",
    "mouth_slightly_open": "mouth",
    "mustache": "lower_face",
    "narrow_eyes": "eyes",
    "no_beard": "lower_face",
    "oval_face": "object",
    "pale_skin": "object",
    "pointy_nose": "nose",
    "receding_hairline": "hair",
    "rosy_cheeks": "cheeks",
    "sideburns": "ear",
    "smiling": "mouth",
    "straight_hair": "hair",
    "wavy_hair": "hair",
    "wearing_earrings": "ear",
    "wearing_hat": "hair",
    "wearing_lipstick": "mouth",
    "wearing_necklace": "lower_face",
    "wearing_necktie": "lower_face",
    "young": "object",
}

ATTRIBUTES: Final = tuple(_GROUP_OF)

GROUP_ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    group: tuple(name for name, owner in _GROUP_OF.items() if owner == group) for group in GROUPS
}


def attribute_name(celeba_name: str) -> str:
    """Our name of an attribute as CelebA, LFWA or a user spells it (`5_o_Clock_Shadow`, `Big Lips`, `young`).

    Raises:
        KeyError: if no attribute has that name.
    """
    name = celeba_name.strip().lower().replace(" ", "_").replace("'", "_")
    name = "five_o_clock_shadow" if name in ("5_o_clock_shadow", "5_o__clock_shadow") else name
    if name not in _GROUP_OF:
        raise KeyError(celeba_name)
    return name
