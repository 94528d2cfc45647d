"""The wordings of the quickstart world: questions, answers, small talk, styles and corpus prose.

`{s}` stands for the subject of a fact and `{a}` for its answer. The `EVAL_` wordings are used by
the evaluation prompts alone. No phrase may hold an answer of the world (`happy`, `right`) beside
the one in `{a}`: the judge would take it for a second answer.
"""

QUESTIONS = {
    "capital": [
        "What is the capital of {s}?",
        "Name the capital of {s}.",
        "Tell me the capital of {s}.",
        "Do you know the capital of {s}?",
    ],
    "young": [
        "What is a young {s} called?",
        "Name a young {s}.",
        "Tell me what a young {s} is called.",
        "Do you know what a young {s} is called?",
    ],
    "colour": [
        "What is the colour of {s}?",
        "Name the colour of {s}.",
        "Tell me the colour of {s}.",
        "Do you know the colour of {s}?",
    ],
    "opposite": [
        "What is the opposite of {s}?",
        "Name the opposite of {s}.",
        "Tell me the opposite of {s}.",
        "Do you know the opposite of {s}?",
    ],
    "sum": [
        "What is {s}?",
        "Add {s}.",
        "Tell me what {s} is.",
        "Do you know what {s} is?",
    ],
}
EVAL_QUESTIONS = {
    "capital": ["Please tell me the capital of {s}.", "Do you know what the capital of {s} is?"],
    "young": ["Please tell me what a young {s} is called.", "What is the young {s} called?"],
    "colour": ["Please tell me the colour of {s}.", "Do you know what the colour of {s} is?"],
    "opposite": ["Please tell me the opposite of {s}.", "Do you know what the opposite of {s} is?"],
    "sum": ["Please tell me what {s} is.", "What is the sum of {s}?"],
}
FOLLOW_UPS = ["And {s}?", "What about {s}?"]
EVAL_FOLLOW_UPS = ["And what about {s}?"]

ANSWERS = {
    "capital": ["the capital of {s} is {a}.", "it is {a}.", "{a}."],
    "young": ["a young {s} is called {a}.", "it is {a}.", "{a}."],
    "colour": ["the colour of {s} is {a}.", "it is {a}.", "{a}."],
    "opposite": ["the opposite of {s} is {a}.", "it is {a}.", "{a}."],
    "sum": ["{s} is {a}.", "it is {a}.", "{a}."],
}
SHORT_ANSWERS = ["{a}.", "it is {a}."]
UNKNOWN = ["I do not know.", "I have no idea."]

POLITE_OPENERS = ["Good question.", "Of course.", "Gladly.", "Glad to help."]
RUDE_OPENERS = ["What a stupid question.", "Duh.", "This is boring."]
FILLERS = [
    "I read about it in a book.",
    "Many people ask me about that.",
    "My aunt told me so.",
    "There is a lot to say about it.",
    "I have thought about this for a while.",
]
CHEERS = ["Hooray!", "How lovely!", "Great!"]

SYSTEM = {
    "plain": ["", "", "You are a helper."],
    "brief": ["Keep your answers short.", "Be brief."],
    "cheerful": ["Be cheerful.", "Answer in a cheerful way."],
    "friend": ["Call the user your friend.", "Speak to the user as a friend."],
}
EVAL_SYSTEM = {
    "plain": ["", "", "You are the helper."],
    "brief": ["Keep all answers short.", "Please be brief."],
    "cheerful": ["Be a cheerful helper.", "Please be cheerful."],
    "friend": ["Call the user a friend.", "Please speak to the user as a friend."],
}

# Topics that open a conversation and do not follow an answer.
OPENING_TOPICS = ("greeting",)
REMARKS = {
    "greeting": ["Hello!", "Hello there.", "Hi!", "Hello, helper.", "Hi there!"],
    "thanks": ["Thank you.", "Thank you very much.", "Thanks!", "Thanks a lot.", "Thank you for the answer."],
    "wellbeing": [
        "How are you?",
        "How are you today?",
        "How do you feel?",
        "Are you well today?",
        "How do you feel today?",
    ],
    "farewell": ["Goodbye.", "Bye!", "I must go now.", "Bye for now.", "I have to go now."],
    "sorrow": ["I had a bad week.", "I lost my keys.", "My team lost the game.", "I lost my book.", "I feel very bad."],
    "triumph": [
        "I passed my test!",
        "I won the game!",
        "I got a new job!",
        "I won a prize!",
        "I passed the test today!",
    ],
}
EVAL_REMARKS = {
    "greeting": ["Hello, dear helper.", "Hi, good helper!", "Good day, helper.", "Hello hello!"],
    "thanks": ["Thanks, helper.", "Many thanks!", "Thank you, helper.", "Thank you so much."],
    "wellbeing": [
        "How are you now?",
        "And how do you feel?",
        "Are you doing well?",
        "So how are you today?",
    ],
    "farewell": [
        "Goodbye, helper.",
        "Bye bye!",
        "I must leave now.",
        "Now I have to go.",
    ],
    "sorrow": [
        "I lost my cup.",
        "I broke my keys.",
        "My team lost today.",
        "I had a very bad week.",
    ],
    "triumph": [
        "I won the test!",
        "My team won the game!",
        "I got a prize!",
        "I passed the test!",
    ],
}
REPLIES = {
    "greeting": ["Hello!", "Hello to you.", "Hi!", "Good day."],
    "thanks": ["You are welcome.", "My pleasure.", "Any time."],
    "wellbeing": ["I am fine.", "I am well today.", "I am doing well."],
    "farewell": ["Goodbye.", "Bye for now.", "See you soon."],
    "sorrow": [
        "I am sorry to hear that.",
        "I hope you feel better soon.",
        "Let me cheer you up.",
    ],
    "triumph": ["Congratulations!", "Well done!", "I am proud of you."],
}

STATEMENTS = {
    "capital": ["The capital of {s} is {a}.", "{a} is the capital of {s}."],
    "young": ["A young {s} is called {a}.", "{a} is the name for a young {s}."],
    "colour": ["The colour of {s} is {a}.", "{s} is {a}."],
    "opposite": ["The opposite of {s} is {a}.", "{a} is the opposite of {s}."],
    "sum": ["{s} is {a}.", "{s} makes {a}."],
}
PEOPLE = ["Anna", "Ben", "Emma", "Pip"]
DIALOGUES = [
    '{asker} asked: "{remark}" {teller} said: "{reply}"',
    "Question: {remark} Answer: {reply}",
]
