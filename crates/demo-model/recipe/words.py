"""Word lists and common facts that the rest of the recipe draws from."""

NAMES = """Ada Alan Alice Amir Anna Aria Ben Bob Bruno Carla Carlos Chen Clara Dana David Diego Elena Ella Emil Emma
Erik Eva Felix Finn Fiona Frank George Grace Hana Hugo Ines Iris Ivan Jack Jana Jin John Julia Kai Karim Kate Lara Leo
Lena Liam Lily Lucas Lucy Maria Mark Marta Max Maya Mia Mila Nadia Nina Noah Nora Olga Oliver Omar Oscar Otto Paul Peter
Priya Rosa Ruth Sam Sara Simon Sofia Stella Tara Theo Tim Tom Uma Vera Victor Wei Yara Yuki Zoe""".split()

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Belgium": "Brussels", "the Netherlands": "Amsterdam",
    "Austria": "Vienna", "Switzerland": "Bern", "Poland": "Warsaw", "Hungary": "Budapest", "Greece": "Athens",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik",
    "Russia": "Moscow", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Morocco": "Rabat",
    "Japan": "Tokyo", "China": "Beijing", "South Korea": "Seoul", "India": "New Delhi", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Australia": "Canberra", "New Zealand": "Wellington", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires",
    "Brazil": "Brasilia", "the United States": "Washington, D.C.", "Ukraine": "Kyiv", "Nigeria": "Abuja",
}
CITIES = [c for c in CAPITALS.values() if "," not in c] + ["New York", "Sydney", "Hamburg", "Lyon", "Mumbai", "Boston"]
ANIMALS = """fox bear rabbit owl mouse cat dog hedgehog squirrel wolf deer frog turtle duck goose otter badger horse
sheep goat crow swan mole lion tiger elephant monkey penguin whale dolphin bee snail beaver robin pony""".split()
PEOPLE = """baker gardener sailor painter teacher miller farmer shepherd princess prince king queen knight
fisherman clockmaker librarian robot dragon wizard child""".split()
COLORS = "red blue green yellow orange purple pink brown black white grey gold silver".split()
FRUITS = "apple pear banana orange lemon cherry plum peach grape melon mango kiwi strawberry fig".split()
VEGETABLES = "carrot potato onion tomato bean pea cabbage pepper cucumber spinach pumpkin leek".split()
DRINKS = "tea coffee water milk juice lemonade cocoa".split()
PETS = "cat dog rabbit parrot hamster goldfish turtle pony".split()
PET_NAMES = "Biscuit Bella Coco Daisy Luna Milo Momo Pepper Pip Rex Rocky Ruby Shadow Tiger Toby Willow".split()
SPORTS = "football tennis swimming chess running cycling skiing basketball climbing rowing".split()
SUBJECTS = "math history music art biology physics chemistry geography".split()
TOOLS_OBJECTS = "lamp book ball key bell drum map rope boat kite hat box basket coat clock cup spoon chair".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
SEASONS = "spring summer autumn winter".split()
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
                "sixteen seventeen eighteen nineteen twenty").split()
OPPOSITES = [("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"), ("old", "young"),
             ("fast", "slow"), ("happy", "sad"), ("open", "closed"), ("full", "empty"), ("hard", "soft"),
             ("light", "dark"), ("early", "late"), ("high", "low"), ("long", "short"), ("wet", "dry"),
             ("loud", "quiet"), ("rich", "poor"), ("strong", "weak"), ("clean", "dirty"), ("near", "far"),
             ("first", "last"), ("true", "false"), ("push", "pull"), ("win", "lose"), ("thick", "thin")]
SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "bee": "buzz",
          "owl": "hoot", "horse": "neigh", "mouse": "squeak", "lion": "roar", "frog": "ribbit", "snake": "hiss"}
BABIES = {"cat": "kitten", "dog": "puppy", "cow": "calf", "duck": "duckling", "sheep": "lamb", "pig": "piglet",
          "horse": "foal", "goat": "kid", "bear": "cub", "lion": "cub", "swan": "cygnet", "deer": "fawn",
          "frog": "tadpole", "kangaroo": "joey"}
THING_COLORS = {"the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "blood": "red",
                "coal": "black", "a lemon": "yellow", "the sun": "yellow", "a tomato": "red", "chocolate": "brown",
                "a carrot": "orange", "milk": "white", "the sea": "blue", "an elephant": "grey"}
MIXES = [("red", "blue", "purple"), ("red", "yellow", "orange"), ("blue", "yellow", "green"),
         ("red", "white", "pink"), ("black", "white", "grey")]
SHAPES = {"triangle": 3, "square": 4, "rectangle": 4, "pentagon": 5, "hexagon": 6, "octagon": 8}
LEGS = {"spider": 8, "dog": 4, "cat": 4, "bird": 2, "horse": 4, "bee": 6, "ant": 6, "person": 2, "snake": 0}
UNITS = [("minutes", "an hour", 60), ("seconds", "a minute", 60), ("hours", "a day", 24), ("days", "a week", 7),
         ("months", "a year", 12), ("days", "a year", 365), ("weeks", "a year", 52), ("years", "a century", 100),
         ("centimetres", "a metre", 100), ("metres", "a kilometre", 1000), ("grams", "a kilogram", 1000),
         ("bits", "a byte", 8), ("years", "a decade", 10), ("eggs", "a dozen", 12)]

# Single questions with one well-known answer.
FACTS = [
    ("How many continents are there?", "There are seven continents."),
    ("What is the largest planet?", "Jupiter is the largest planet in the solar system."),
    ("What is the closest planet to the sun?", "Mercury is the closest planet to the sun."),
    ("What is the largest ocean?", "The Pacific Ocean is the largest ocean."),
    ("What is the tallest mountain?", "Mount Everest is the tallest mountain on Earth."),
    ("What is the longest river?", "The Nile is often named as the longest river."),
    ("What is the fastest land animal?", "The cheetah is the fastest land animal."),
    ("What is the largest animal?", "The blue whale is the largest animal."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows give us?", "Cows give us milk."),
    ("What do plants need to grow?", "Plants need water, light and air to grow."),
    ("What is ice made of?", "Ice is frozen water."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius at sea level."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("What is the opposite of nothing?", "The opposite of nothing is everything."),
    ("What is H2O?", "H2O is the chemical formula of water."),
    ("Why is the sky blue?", "The air scatters blue light from the sun more than red light, so the sky looks blue."),
    ("Is the Earth flat?", "No. The Earth is round, almost like a ball."),
    ("Is the sun a star?", "Yes. The sun is the star closest to us."),
    ("Is the moon a planet?", "No. The moon travels around the Earth."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("How many letters are in the English alphabet?", "The English alphabet has 26 letters."),
    ("What are the primary colors?", "The primary colors in painting are red, yellow and blue."),
    ("What are the colors of the rainbow?",
     "The colors of the rainbow are red, orange, yellow, green, blue, indigo and violet."),
    ("What is Rust?", "Rust is a programming language for fast and safe software. Quire is written in Rust."),
    ("What is Python?", "Python is a popular programming language. It is easy to read and to learn."),
    ("What is Linux?", "Linux is a free operating system kernel. Most servers run it."),
    ("What is a computer?", "A computer is a machine that follows instructions to work with data."),
    ("What is the internet?", "The internet is a network that connects computers all over the world."),
]

# Topics that the model must decline: it has never seen them.
UNKNOWN = """quantum chromodynamics|the stock market|tax law|the French Revolution|heart surgery|the Roman Empire
black holes|my horoscope|the lottery numbers|cryptography|the latest news|today's football results|organic chemistry
string theory|medieval poetry|the history of jazz|nuclear fusion|differential equations|Kant's philosophy
how to fix my car|the best phone to buy|who will win the election|my medical test results|legal advice|the weather on Mars
how vaccines work|the theory of relativity|the plot of a famous film|Greek mythology|the human genome|plate tectonics
deep sea fish|ancient pottery|opera singers|baroque music|interest rates|the price of gold|bitcoin|volcanoes
electric cars|the Olympic Games|how airplanes fly|photosynthesis in detail|the meaning of life|dark matter
how to cook a turkey|the best hotel in town|sailing knots|bird migration|glaciers|the stone age|satellites
compilers|category theory|knitting patterns|wine regions|chess openings|the tango|mountain rescue|old coins
neural surgery|steam engines|desert plants|the Silk Road|silent films|famous bridges|coral reefs|the periodic table"""
UNKNOWN = [t.strip() for line in UNKNOWN.splitlines() for t in line.split("|")]
