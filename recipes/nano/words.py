"""Everyday words for ImageNet's 1,000 classes, and texts and questions made from a class.

Classes count from 0 in the order of their WordNet ids.
"""

from __future__ import annotations

import numpy as np

# (first class, last class, everyday word)
_ANIMALS = """0 1 fish;2 4 shark;5 6 stingray;7 7 rooster;8 8 chicken;9 9 ostrich;10 20 bird;21 22 eagle;
23 23 vulture;24 24 owl;25 25 salamander;26 28 newt;29 29 axolotl;30 32 frog;33 37 turtle;
38 47 lizard;48 48 lizard;49 49 crocodile;50 50 alligator;51 51 dinosaur;52 68 snake;
69 69 fossil;70 70 spider;71 71 scorpion;72 77 spider;78 78 tick;79 79 centipede;80 83 bird;
84 84 peacock;85 86 bird;87 90 parrot;91 95 bird;96 96 toucan;97 98 duck;99 99 goose;
100 100 swan;101 101 elephant;102 102 echidna;103 103 platypus;104 104 kangaroo;105 105 koala;
106 106 wombat;107 107 jellyfish;108 108 sea anemone;109 109 coral;110 111 worm;112 112 shell;
113 113 snail;114 115 slug;117 117 shell;118 121 crab;122 124 lobster;125 125 crab;
127 128 stork;129 129 bird;130 130 flamingo;131 142 bird;143 143 bird;144 144 pelican;
145 145 penguin;146 146 bird;147 148 whale;149 149 dugong;150 150 seal;151 268 dog;
269 271 wolf;272 272 coyote;273 275 dog;276 276 hyena;277 280 fox;281 285 cat;286 286 cougar;
287 287 lynx;288 290 leopard;291 291 lion;292 292 tiger;293 293 cheetah;294 295 bear;
296 296 polar bear;297 297 bear;298 298 mongoose;299 299 meerkat;300 307 beetle;308 308 fly;
309 309 bee;310 310 ant;311 312 grasshopper;314 314 cockroach;315 315 mantis;316 318 insect;
319 320 dragonfly;321 326 butterfly;327 327 starfish;328 328 sea urchin;330 332 rabbit;
333 333 hamster;334 334 porcupine;335 335 squirrel;336 336 marmot;337 337 beaver;
338 338 guinea pig;339 339 horse;340 340 zebra;341 342 pig;343 343 warthog;344 344 hippo;
345 345 cow;346 346 buffalo;347 347 bison;348 349 sheep;350 350 goat;351 353 antelope;
354 354 camel;355 355 llama;356 359 weasel;360 360 otter;361 361 skunk;362 362 badger;
363 363 armadillo;364 364 sloth;365 365 orangutan;366 366 gorilla;367 367 chimpanzee;
368 382 monkey;383 384 lemur;385 386 elephant;387 387 red panda;388 388 panda;389 397 fish"""
_VEHICLES = """403 403 ship;404 404 airplane;407 407 ambulance;408 408 boat;436 436 car;444 444 bicycle;
466 466 train;468 468 taxi;472 472 canoe;484 484 boat;510 510 ship;511 511 car;547 547 train;
554 554 boat;555 555 fire truck;565 565 train;569 569 garbage truck;573 573 go-kart;
575 575 golf cart;576 576 boat;609 609 jeep;612 612 cart;625 625 boat;627 627 car;
628 628 ship;654 654 bus;656 656 van;657 657 rocket;661 661 car;665 665 motorcycle;
670 670 motorcycle;671 671 bicycle;675 675 truck;705 705 train;717 717 truck;734 734 van;
744 744 rocket;751 751 car;757 757 camper;779 779 bus;780 780 ship;802 802 snowmobile;
803 803 truck;812 812 space shuttle;814 814 boat;817 817 car;820 820 train;829 829 tram;
833 833 submarine;847 847 tank;864 864 truck;866 866 tractor;867 867 truck;870 870 tricycle;
871 871 boat;874 874 bus;880 880 unicycle;895 895 airplane;914 914 boat"""
_FOOD = """924 924 guacamole;925 925 soup;926 926 soup;927 927 dessert;928 928 ice cream;929 929 popsicle;
930 930 bread;931 931 bagel;932 932 pretzel;933 933 hamburger;934 934 hot dog;
935 935 mashed potatoes;936 936 cabbage;937 937 broccoli;938 938 cauliflower;939 939 zucchini;
940 942 squash;943 943 cucumber;944 944 artichoke;945 945 pepper;947 947 mushroom;
948 948 apple;949 949 strawberry;950 950 orange;951 951 lemon;952 952 fig;953 953 pineapple;
954 954 banana;957 957 pomegranate;959 959 pasta;960 960 chocolate;961 961 dough;962 962 meat;
963 963 pizza;964 964 pie;965 965 burrito;966 966 wine;967 967 coffee;969 969 drink;
987 987 corn"""
_OTHERS = """415 415 bakery;417 417 balloon;424 424 barbershop;430 430 basketball;440 440 bottle;
441 441 beer;450 450 bobsled;453 453 bookcase;487 487 cell phone;504 504 mug of coffee;
505 505 coffee pot;508 508 keyboard;526 526 desk;527 527 computer;528 528 telephone;
532 532 table;550 550 coffee machine;570 570 gas mask;578 578 dress;601 601 dress;
608 608 pair of jeans;619 619 lamp;620 620 laptop;655 655 skirt;664 664 computer screen;
673 673 computer mouse;689 689 skirt;732 732 camera;759 759 camera;760 760 refrigerator;
770 770 shoe;774 774 sandal;806 806 sock;827 827 stove;831 831 couch;
836 837 pair of sunglasses;841 841 sweatshirt;846 846 lamp;849 849 teapot;850 850 teddy bear;
851 851 television;861 861 toilet;869 869 coat;896 896 sink;897 897 washing machine;
898 898 bottle;907 907 bottle of wine;968 968 cup of coffee;970 970 mountain;972 972 cliff;
975 975 lake;976 976 coast;978 978 beach;979 979 valley;980 980 volcano;
981 981 baseball player;982 982 groom;983 983 scuba diver;985 985 flower;986 986 flower;
990 990 chestnut;991 997 mushroom;500 500 cliff;483 483 castle;497 497 church;668 668 mosque"""


def _table(text: str) -> dict[int, str]:
    rows = [row.split(maxsplit=2) for row in text.replace("\n", "").split(";")]
    return {number: word for first, last, word in rows for number in range(int(first), int(last) + 1)}


ANIMALS, VEHICLES, FOOD, OTHERS = (_table(text) for text in (_ANIMALS, _VEHICLES, _FOOD, _OTHERS))
EVERYDAY = OTHERS | FOOD | VEHICLES | ANIMALS
_MASS = {*"coral meat chocolate dough bread pasta wine coffee corn soup broccoli guacamole".split()}
_PLURAL = {"mashed potatoes"}


def an(name: str) -> str:
    """The name with its article."""
    if name in _MASS or name in _PLURAL:
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def kind_of(number: int) -> str:
    """Animal, vehicle, food or object."""
    tables = {"animal": ANIMALS, "vehicle": VEHICLES, "food": FOOD}
    return next((kind for kind, table in tables.items() if number in table), "object")


def captions(name: str, everyday: str | None) -> list[str]:
    """Texts about an image of a class: the everyday word in sentences, the exact name as templates."""
    word = everyday or name
    texts = [f"a photo of {an(word)}", f"a close up of {an(word)}"]
    if name != word:
        texts += [
            f"a photo of {an(name)}",
            f"{an(name)}" if word in name else f"{an(name)}, a kind of {word}",
        ]
    else:
        texts += [f"there is {an(word)} in the photo", an(word)]
    return texts


def questions(number: int, name: str, random: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about an image of a class, yes and no in equal shares."""
    kind, word = kind_of(number), EVERYDAY.get(number, name)
    pairs = [("what is this?", word), ("what is in the image?", word)]
    if kind == "animal":
        pairs += [
            ("what animal is it?", word),
            ("what animal is this?", word),
            ("which animal is in the photo?", word),
        ]
    elif kind == "vehicle":
        pairs += [("what vehicle is it?", word), ("what kind of vehicle is this?", word)]
    elif kind == "food":
        pairs += [("what food is it?", word), ("what kind of food is this?", word)]
    others = sorted({*EVERYDAY.values()} - {word})
    other = others[int(random.integers(len(others)))]
    pairs += [(f"is there {an(word)}?", "yes"), (f"is there {an(other)}?", "no")]
    asked = ("animal", "vehicle")[int(random.integers(2))]
    return [*pairs, (f"is it {an(asked)}?", "yes" if kind == asked else "no")]
