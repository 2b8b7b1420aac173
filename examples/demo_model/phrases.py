"""The wordings of every question, and of the small talk, that the demo model learns.

``{name}`` fields are filled by ``questions.py``. "color" is the spelling here; ``reword`` turns it
into "colour" by chance, drops capitals and question marks, and so on.
"""

from random import Random

ONE_COLOUR = (
    "What color is the shape?", "What color is it?", "Which color does the shape have?",
    "What is the color of the shape?", "What is the color of this shape?", "Name the color.",
    "What color is this?", "What color do you see?", "Which color is it?",
    "Tell me the color of the shape.", "What color is the shape in the picture?",
    "What color is the object?", "What's the color?", "color?",
    "What is the color of the object in this image?", "Which color is the shape in the image?",
    "What color is this shape?", "What is the shape's color?", "Can you tell me the color?",
)  # fmt: skip
ONE_SHAPE = (
    "What shape is this?", "What shape is it?", "Which shape is this?", "What is the shape?",
    "Name the shape.", "What shape do you see?", "What shape is in the picture?",
    "Which shape is in the image?", "What kind of shape is this?", "Tell me the shape.",
    "What shape is shown?", "Which shape do you see here?", "What shape is in the image?", "shape?",
    "What's the shape?", "What shape is the object?", "Can you name the shape?",
    "Which shape can you see?", "What is the name of this shape?",
    "What shape does the picture show?",
)  # fmt: skip
ONE_WHAT = (
    "What is this?", "What do you see?", "What is in the picture?", "What is in the image?",
    "What is in this image?", "What's in this image?", "What does the picture show?",
    "What can you see?", "What's this?", "What is shown in the picture?", "What is shown here?",
    "What's in the picture?", "What do you see in the image?", "What do you see in this picture?",
    "Tell me what you see.", "What is it?",
)  # fmt: skip
NAMED_COLOUR = (
    "What color is the {shape}?", "Which color does the {shape} have?",
    "What is the color of the {shape}?", "Tell me the color of the {shape}.",
    "Which color is the {shape}?", "What color is the {shape} in the picture?",
    "What color does the {shape} have?", "What's the color of the {shape}?",
)  # fmt: skip
COLOUR_SHAPE = (
    "What shape is {colour}?", "Which shape is {colour}?", "What is the {colour} shape?",
    "What shape is the {colour} one?", "What shape is the {colour} object?", "What is {colour}?",
    "Which shape is the {colour} one?", "What is the shape of the {colour} object?",
)  # fmt: skip
POSITION = (
    "Where is the {name}?", "Where is the {name} in the picture?", "Where do you see the {name}?",
    "In which part of the picture is the {name}?", "Where in the image is the {name}?",
    "What is the position of the {name}?", "Tell me where the {name} is.", "Find the {name}.",
    "Where can I find the {name}?", "Locate the {name}.", "Where's the {name}?",
    "Where is the {name} located?",
)  # fmt: skip
AT_PLACE = (
    "What is {place}?", "What do you see {place}?", "Which shape is {place}?",
    "What shape is {place}?",
)  # fmt: skip
COUNT = (
    "How many shapes are there?", "How many shapes do you see?", "Count the shapes.",
    "How many shapes are in the picture?", "How many objects are there?", "How many are there?",
    "What is the number of shapes?", "How many shapes can you see?", "How many shapes?",
    "How many shapes are in the image?", "How many shapes are in this image?",
    "How many objects are in the picture?", "Can you count the shapes?",
    "How many objects do you see?",
)  # fmt: skip
COUNT_SOME = (
    "How many {names} are there?", "How many {names} do you see?", "Count the {names}.",
    "How many {names} are in the picture?", "How many {names} can you see?",
    "How many {names} are in the image?",
)  # fmt: skip
IS_THERE = (
    "Is there a {name}?", "Is there a {name} in the picture?", "Do you see a {name}?",
    "Can you see a {name}?", "Does the picture show a {name}?", "Is there a {name} in the image?",
)  # fmt: skip
IS_COLOUR = (
    "Is the shape {colour}?", "Is it {colour}?", "Is the object {colour}?", "Is this {colour}?",
)  # fmt: skip
IS_SHAPE = ("Is it a {shape}?", "Is this a {shape}?", "Is the shape a {shape}?")
SIZE = (
    "How big is the {name}?", "What size is the {name}?", "What is the size of the {name}?",
    "Is the {name} small or large?", "How large is the {name}?", "Is the {name} big or small?",
)  # fmt: skip
BACKGROUND = (
    "What is the background?", "What does the background look like?", "Describe the background.",
    "How does the background look?", "What kind of background is it?", "What is behind the shape?",
)  # fmt: skip
BACKGROUND_COLOUR = (
    "What color is the background?", "What is the color of the background?",
    "Which color is the background?", "What's the background color?",
)  # fmt: skip
DESCRIBE = (
    "Describe the picture.", "Describe the image.", "Describe this picture.",
    "Describe this image.", "Please describe the picture.", "Give a description of the image.",
    "What does the whole picture look like?", "Describe what you see.",
    "Can you describe the image?",
    "Describe the scene.", "Caption this image.", "Write a caption.", "Describe it.", "describe",
    "Please describe this image in detail.", "Describe everything you see.",
)  # fmt: skip
WHICH_PICTURE = (
    "Which picture shows a {name}?", "Which image shows a {name}?", "Which picture has a {name}?",
    "Which one shows a {name}?", "Which picture contains a {name}?", "Which image has a {name}?",
    "Which of the pictures shows a {name}?",
)  # fmt: skip
WHERE_PICTURE = (
    "In which picture is the {name}?", "In which image do you see the {name}?",
    "Where is the {name}, in which picture?", "In which image is the {name}?",
    "Where is the {name}?",
)  # fmt: skip
NUM_PICTURES = (
    "How many pictures are there?", "How many images do you see?", "How many pictures did I send?",
    "How many images are there?",
)  # fmt: skip
ORDINAL_WHAT = (
    "What is in the {ordinal} picture?", "What does the {ordinal} picture show?",
    "What do you see in the {ordinal} image?", "What shape is in the {ordinal} picture?",
    "What is in the {ordinal} image?",
)  # fmt: skip
ORDINAL_COLOUR = (
    "What color is the shape in the {ordinal} picture?",
    "What color is the shape in the {ordinal} image?",
    "Which color does the {ordinal} picture show?",
)  # fmt: skip
SAME_COLOUR = (
    "Are the shapes the same color?", "Do the shapes have the same color?",
    "Do both pictures show the same color?", "Is the color the same?",
)  # fmt: skip
SAME_SHAPE = (
    "Do both pictures show the same shape?", "Is it the same shape?", "Are the shapes the same?",
    "Is the shape the same in both pictures?",
)  # fmt: skip
COMPARE = (
    "Describe the pictures.", "Describe both pictures.", "What do the pictures show?",
    "What is in the pictures?", "Describe the images.", "Compare the pictures.",
    "What is the difference?", "What is the difference between the pictures?", "What do you see?",
)  # fmt: skip
DIRECTION = (
    "Which way does the shape move?", "In which direction does the shape move?",
    "Where does the shape move?", "Which way does it move?", "How does the shape move?",
    "Which direction is it moving?", "Where does it go?", "Where is the {shape} going?",
    "Which way does the {shape} move?", "In which direction does the {shape} move?",
    "These are frames of a clip. Which way does the shape move?", "What happens in the clip?",
    "What happens in this video?", "Which way is the {shape} moving?", "How does it move?",
)  # fmt: skip
MOVER = ("What moves?", "What is moving?", "Which shape moves?", "What shape is moving?")
SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant.", "Answer briefly.",
    "You are Chiasm.", "You describe pictures.", "Be short.", "You are a friendly assistant.",
)  # fmt: skip

_HELLO = "Hello! Send me a picture of some shapes and ask me about it."
_WHO = "I am the Chiasm demo model. I can see simple shapes and answer questions about them."
_CAN = "I can tell you the color, shape, size and place of shapes in a picture, and count them."
_SHAPES = "I know circles, squares, triangles, stars, crosses and hearts."
_COLOURS = "I know red, green, blue, yellow, orange, purple, black, white and grey."
_THANKS = "You are welcome!"
_BYE = "Goodbye!"
_FINE = "I am fine, thank you. Send me a picture of some shapes."
_NO_PICTURE = "I see no picture. Please send me one."
_UNKNOWN = "I am a small demo model. I only know about pictures of simple shapes."

SMALL_TALK = (
    *((text, _HELLO) for text in (
        "Hello!", "Hello", "Hi!", "Hi", "Hey", "Hello there!", "Good morning!", "Good evening!",
        "Hey there", "Hi, how can I use you?", "Greetings!", "hello?", "Good afternoon.",
        "Hello, world!",
    )),
    *((text, _WHO) for text in (
        "Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
        "What model is this?", "Which model are you?", "Are you a robot?", "Introduce yourself.",
        "Say something about yourself.", "What is Chiasm?",
    )),
    *((text, _CAN) for text in (
        "What can you do?", "How can you help me?", "What can I ask you?", "Help", "Help me.",
        "What do you know?", "What are you good at?", "What should I ask?", "Can you see pictures?",
        "What questions can you answer?",
    )),
    *((text, _SHAPES) for text in (
        "Which shapes do you know?", "What shapes do you know?", "Name some shapes.",
        "List the shapes.", "Which shapes can you see?", "Tell me some shapes.",
    )),
    *((text, _COLOURS) for text in (
        "Which colors do you know?", "What colors do you know?", "Name some colors.",
        "List the colors.", "Which colors can you see?", "Tell me some colors.",
    )),
    *((text, _THANKS) for text in ("Thank you!", "Thanks!", "Thanks a lot.",
    "Thank you very much.")),
    *((text, _BYE) for text in ("Goodbye!", "Bye!", "Bye", "See you.", "Good night!")),
    *((text, _FINE) for text in ("How are you?", "How do you do?", "How is it going?",
    "Are you fine?")),
    *((text, _NO_PICTURE) for text in (
        "What color is the shape?", "What shape is this?", "How many shapes are there?",
        "Describe the picture.", "Where is the star?", "What do you see?", "What is in the image?",
        "What is in this image?", "Describe the image.", "What is this?",
    )),
    *((text, _UNKNOWN) for text in (
        "What is the weather like?", "Tell me a joke.", "What is the capital of France?",
        "Write a poem.", "Who is the president?", "What time is it?", "Write a story.",
        "What is two plus two?", "Explain the theory of relativity.", "Write some code.",
        "Tell me a story.", "What is the meaning of life?",
    )),
    ("Count to three.", "One, two, three."),
    ("Count to five.", "One, two, three, four, five."),
    ("Count to ten.", "One, two, three, four, five, six, seven, eight, nine, ten."),
    ("Count from one to five.", "One, two, three, four, five."),
    ("Count from one to ten.", "One, two, three, four, five, six, seven, eight, nine, ten."),
    ("Count backwards from five.", "Five, four, three, two, one."),
    ("Say hello.", "Hello!"),
    ("Say yes.", "Yes."),
    ("Say no.", "No."),
    ("Repeat after me: red star.", "Red star."),
    ("Repeat after me: blue circle.", "Blue circle."),
    ("How many corners does a triangle have?", "A triangle has three corners."),
    ("How many corners does a square have?", "A square has four corners."),
    ("How many corners does a circle have?", "A circle has no corners."),
    ("How many points does a star have?", "A star has five points."),
    ("What shape is round?", "A circle is round."),
)  # fmt: skip


def reword(question: str, rng: Random) -> str:
    """Vary the spelling of a question as people do; the meaning stays."""
    if rng.random() < 0.3:
        question = question.replace("color", "colour")
    if rng.random() < 0.15:
        question = question.replace("grey", "gray")
    if rng.random() < 0.06:
        question = f"Please {question[0].lower()}{question[1:]}"
    if rng.random() < 0.3:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.2 and not question.endswith(("one.", "!")):
        question = question.rstrip("?.")
    if rng.random() < 0.06:
        question += rng.choice((" ", "\n", " Answer in one sentence.", " Please answer."))
    return question
