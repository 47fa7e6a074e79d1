"""The vocabulary of the demonstration model: every text that it is trained on is made of these words."""

# ruff: noqa: SIM905 - lists of hundreds of words are easier to read and edit as text

ADJECTIVES = """amber ancient bold brave bright bronze calm clever copper coral crimson curious dark distant dusty eager
early emerald faint fast fierce gentle giant golden grand green happy hidden hollow humble icy indigo ivory jolly kind
late little lonely loud lucky mellow merry misty noble odd pale patient plain polite proud purple quick quiet rapid rare
royal rusty sad scarlet secret shiny silent silver simple sleepy slow small smooth snowy soft solid steady strange
strong sunny swift tall tender tidy tiny violet warm white wild wise wooden yellow young""".split()

ANIMALS = """badger bear beaver camel cat crane crow deer dog donkey dragon duck eagle falcon fox frog goat goose hare
hawk hedgehog heron horse lion lizard lynx mole moose mouse otter owl panda parrot penguin pig rabbit raven robin salmon
seal sheep snail sparrow spider squirrel swan tiger toad turtle whale wolf wren""".split()

THINGS = """anchor apple basket bell boat book bottle bowl box bridge broom brush bucket button candle carpet chair
clock cloud coat coin compass crown cup curtain desk door drum engine feather flag flower flute fork garden gate glass
glove hammer hat helmet island jacket kettle key kite ladder lamp lantern leaf letter map mirror moon needle notebook
orange paper pear pencil piano pillow plate pocket quilt radio ribbon ring river road rope saddle scarf shell shoe spoon
star stone sun table tent ticket tower train tree trumpet umbrella vase violin wagon wallet wheel window xylophone yard
zebra""".split()

NAMES = """Ada Alan Alma Amir Anna Ben Bruno Carla Chen Clara Daniel David Diana Elena Emil Emma Eva Felix Fiona Frank
Grace Hana Hugo Ida Igor Iris Ivan Jack Jana Jonas Julia Kira Lara Leo Lena Lisa Luca Lucy Maria Marta Max Mia Milo Nina
Noah Nora Olga Oscar Otto Paul Petra Priya Rosa Ruth Sam Sara Simon Sofia Tara Theo Tom Uma Vera Victor Wanda Yara Yuki
Zoe""".split()

CITIES = """Athens Berlin Bern Boston Cairo Chicago Delhi Dublin Geneva Hamburg Helsinki Istanbul Kyoto Lagos Lima
Lisbon London Lyon Madrid Milan Moscow Mumbai Nairobi Naples Oslo Paris Porto Prague Quito Rome Santiago Seoul Sydney
Tokyo Toronto Tunis Venice Vienna Warsaw Zurich""".split()

PLACES = """attic barn bakery castle cave cellar chapel cottage desert farm forest garage harbor hall hill kitchen lake
library market meadow mill museum office palace park pond port school shop station swamp temple theater valley village
workshop""".split()

# Lists for reversing, sorting and counting are drawn from these.
LIST_WORDS = sorted(set(ANIMALS + THINGS))
