"""The attribute set: CelebA's 40 names in its order, each in one group."""

import pytest

from mgmtn.attributes import ATTRIBUTES, GROUP_ATTRIBUTES, GROUPS, attribute_name

# The header of CelebA's own list_attr_celeba.txt.
# fmt: off
CELEBA = [
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache",
    "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks",
    "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick",
    "Wearing_Necklace", "Wearing_Necktie", "Young",
]
# fmt: on


def test_names_and_order_are_celebas():
    assert tuple(attribute_name(name) for name in CELEBA) == ATTRIBUTES
    assert len(ATTRIBUTES) == 40


def test_each_attribute_is_in_one_of_the_eight_groups_and_each_group_has_some():
    assert tuple(GROUP_ATTRIBUTES) == GROUPS
    assert len(GROUPS) == 8
    grouped = [name for names in GROUP_ATTRIBUTES.values() for name in names]
    assert sorted(grouped) == sorted(ATTRIBUTES)
    assert all(GROUP_ATTRIBUTES.values())


def test_members_of_a_group_keep_celebas_order():
    for names in GROUP_ATTRIBUTES.values():
        assert list(names) == sorted(names, key=ATTRIBUTES.index)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("5_o_Clock_Shadow", "five_o_clock_shadow"),
        ("5 o'Clock Shadow", "five_o_clock_shadow"),
        ("5 o Clock Shadow", "five_o_clock_shadow"),
        ("five_o_clock_shadow", "five_o_clock_shadow"),
        (" Big Lips\n", "big_lips"),
        ("YOUNG", "young"),
    ],
)
def test_a_name_is_known_however_it_is_spelled(spelled, name):
    assert attribute_name(spelled) == name


@pytest.mark.parametrize("name", ["", "beard", "mouth", "smiling2"])
def test_an_unknown_name_is_a_key_error_that_repeats_it(name):
    with pytest.raises(KeyError) as caught:
        attribute_name(name)
    assert caught.value.args == (name,)
