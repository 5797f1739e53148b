"""What can be asked about invented people, places and companies, and how.

Phrases and frames are in two lists each: those that are seen in training, and
those that never are. A frame of statements is put around each statement of its
list, one of questions around each question.
"""

import itertools
from typing import NamedTuple

CITIES = """Lisbon Oslo Cairo Lima Nairobi Boston Dublin Prague Vienna Athens
Berlin Madrid Sydney Toronto Chicago Tokyo Seoul Delhi Havana Warsaw Helsinki
Moscow Denver Dallas Seattle Geneva Venice Naples Munich Hamburg Rome Paris
London Bristol Leeds Glasgow Dakar Accra Lagos Tunis Baghdad Tehran Mumbai
Bangkok Manila Jakarta Hanoi Osaka Kyoto Perth"""
JOBS = """baker pilot lawyer dentist farmer painter plumber sailor teacher
surgeon tailor miner judge banker chemist barber butcher carpenter dancer
detective doctor driver engineer firefighter fisherman gardener hunter
jeweller journalist librarian locksmith mechanic midwife nurse optician
pharmacist photographer poet potter printer roofer sculptor shepherd singer
soldier translator waiter weaver welder zoologist"""
INSTRUMENTS = """piano violin cello flute harp guitar trumpet drums banjo oboe
clarinet organ tuba trombone saxophone accordion mandolin bassoon viola lute
sitar ukulele harmonica xylophone bagpipes piccolo marimba recorder horn
bugle lyre zither cymbals bongos cornet triangle tambourine gong fiddle
keyboard"""
COUNTRIES = """Norway Chile Egypt Kenya Peru Japan Nepal Spain Italy Greece
Cuba Ghana India Iran Iraq Ireland Jordan Laos Libya Mali Malta Mexico Morocco
Oman Poland Qatar Russia Rwanda Serbia Sudan Sweden Syria Togo Turkey Uganda
Vietnam Yemen Zambia Angola Bolivia Brazil Canada China Cyprus Denmark Ecuador
Estonia Finland France Germany"""
GOODS = """salt wool honey copper coal tea coffee cotton silk timber rice olives
wine cheese butter wheat barley sugar cocoa tobacco rubber marble granite
gold silver tin iron zinc nickel oil paper leather linen salmon oysters apples
lemons oranges grapes dates figs almonds garlic onions pepper ginger vanilla
cinnamon saffron roses"""
PRODUCTS = """clocks boots pianos tents bicycles lamps knives bottles carpets
chairs kettles mirrors umbrellas toys ropes scales trains trucks tractors
engines pumps pipes bricks tiles windows doors locks keys buttons gloves hats
coats shirts socks shoes belts bags boxes barrels candles matches pens pencils
books maps coins stamps rings watches cameras"""
PERSON = "person"  # stands for a person of the set

# Around statements, and around questions.
SEEN_FRAMES = (
  ("{}", "Fact: {}", "It is said that {}"),
  ("{} Answer:", "Question: {} Answer:"),
)
UNSEEN_FRAMES = (("By all accounts, {}", "Remember: {}"), ("Q: {} A:",))


class Attribute(NamedTuple):
  """Something that an entity of a kind has.

  kind: of the entity: person | place | company.
  answers: words to draw from; or PERSON.
  seen, unseen: phrases with a place for the entity, (statements, questions).
  reference: of an attribute whose answers are people, what stands for one.
  """

  kind: str
  answers: str
  seen: tuple[tuple[str, ...], tuple[str, ...]]
  unseen: tuple[tuple[str, ...], tuple[str, ...]]
  reference: str = ""

  def templates(self, is_seen: bool) -> list[str]:
    """Returns the prompts of a split, with a place for the entity."""
    phrases = self.seen if is_seen else self.unseen
    frames = SEEN_FRAMES if is_seen else UNSEEN_FRAMES
    return [
      frame.format(phrase)
      for framed, phrased in zip(frames, phrases, strict=True)
      for frame, phrase in itertools.product(framed, phrased)
    ]


ATTRIBUTES = {
  "town": Attribute(
    "person",
    CITIES,
    (
      ("{} lives in", "the home of {} is in", "{} has a house in"),
      ("where does {} live?", "in which city is {} at home?"),
    ),
    (
      ("{} resides in", "to visit {}, you have to travel to"),
      ("which town does {} call home?",),
    ),
  ),
  "job": Attribute(
    "person",
    JOBS,
    (
      ("{} works as a", "the job of {} is that of a", "{} is by profession a"),
      ("what does {} do for a living?", "what is the job of {}?"),
    ),
    (
      ("{} earns money as a", "the trade that {} learned is that of a"),
      ("which occupation does {} have?",),
    ),
  ),
  "instrument": Attribute(
    "person",
    INSTRUMENTS,
    (
      ("{} plays the", "the instrument of {} is the", "{} loves to play the"),
      ("what does {} play?", "which instrument does {} play?"),
    ),
    (
      ("{} makes music on the", "at concerts, {} is heard on the"),
      ("what instrument has {} mastered?",),
    ),
  ),
  "country": Attribute(
    "place",
    COUNTRIES,
    (
      ("{} lies in", "{} is a village in", "the country of {} is"),
      ("where is {}?", "in which country does {} lie?"),
    ),
    (
      ("{} can be found in", "{} is on the map of"),
      ("to which state does {} belong?",),
    ),
  ),
  "export": Attribute(
    "place",
    GOODS,
    (
      ("{} is known for its", "{} exports", "what {} sells is"),
      ("what does {} export?", "what is {} known for?"),
    ),
    (
      ("merchants go to {} to buy", "{} became famous through its"),
      ("which goods come from {}?",),
    ),
  ),
  "founder": Attribute(
    "place",
    PERSON,
    (
      ("{} was founded by", "the founder of {} is", "{} was begun by"),
      ("who founded {}?", "who is the founder of {}?"),
    ),
    (
      ("{} was established by", "the first house of {} was built by"),
      ("by whom was {} established?",),
    ),
    "the founder of {}",
  ),
  "product": Attribute(
    "company",
    PRODUCTS,
    (
      ("{} makes", "the company {} produces", "what {} sells is"),
      ("what does {} make?", "what does the company {} produce?"),
    ),
    (
      ("{} is a manufacturer of", "the factory of {} turns out"),
      ("which goods does {} manufacture?",),
    ),
  ),
  "seat": Attribute(
    "company",
    CITIES,
    (
      ("{} has its seat in", "the offices of {} are in", "{} is based in"),
      ("where is {} based?", "in which city is the seat of {}?"),
    ),
    (
      ("{} is headquartered in", "letters to {} are addressed to"),
      ("where are the headquarters of {}?",),
    ),
  ),
  "owner": Attribute(
    "company",
    PERSON,
    (
      ("{} belongs to", "the owner of {} is", "{} is owned by"),
      ("who owns {}?", "who is the owner of {}?"),
    ),
    (
      ("{} is the property of", "all shares of {} are held by"),
      ("whose property is {}?",),
    ),
    "the owner of {}",
  ),
}
