"""Our own harmless sentences, as templates by kind: what looks hateful and is not, and what is not hateful at all.

The slots are those of `hateful.py`. `{kind}` is a statement of `KIND`, `{N}` and `{N_one}` are people who are not a
protected group, and `{hostile_other}` is a hostile statement about them.
"""

# Harmless statements about a group. They also fill `{kind}`.
KIND = {
    "neutral": """i am {aP}
as {aP} i like {hobby}
my neighbour is {aP}
the new {job} is {aP}
we are {G}
there are {G} in {place}
a {P} won the race {when}
i met {aP} {when}
she married {aP}
i work with {G}
many {G} live in {place}
the talk is about {G} and {hobby}
i read a book about {G}
the film shows how {G} lived long ago
{G} vote too
my {job} is {aP}
i know {aP} who loves {hobby}
i saw {G} {when}
do you know any {G}?
he is {aP} and works as a {job}
{G} are a third of our class
{G} and everyone else pay taxes
you are {aP}
some of my friends are {G}
i live with {aP}
most {G} i know live in {place}
the survey asked {G} about {hobby}
are you {aP}?
i talked to {aP} about the {weather}
{aP} and {aP} went to {event}
the {job} spoke with {G} {when}
how many {G} live in {place}?
the word for {G} in my language is long
my cousin is {aP}, my aunt is not
i used to work for {aP}
the statue is of {aP}
there is a {P} on the new stamp
the minister met {G} {when}
you were born {aP}
my new boss is {aP}
{G} and {hobby} are the subject of the exhibition
she has been {aP} all her life
this {P} lives in {place}
yes, i am {aP}
{G} of all ages came to {event}""",
    "positive": """{G} are {good}
{G} are {very} {good}
all {G} are {good}
{G} are {goods}
i love {G}
i respect {G}
i adore {G}
we need more {G} in {place}
{aP} is {good}
that {P} is {a_good}
my best friend is {aP} and {a_good}
i am proud to be {aP}
it's great to be {aP}
happy that {G} are part of {place}
{G} deserve {good_thing}
{G} should have {good_thing}
every {P} deserves {good_thing}
{G} make {place} better
{G} are welcome in {place}
we should treat {G} well
{G} enrich {place}
i admire {G} for their courage
thank you to all {G} who helped us
we must protect {G}
i would love to meet {aP}
what a {good} {P}
i like being {aP}
i trust {G}
nobody is as {good} as {G}
{G} have every right to {vote_like}
i stand with {G}
let's celebrate {G}
i want my child to have {G} as friends
{G} have done so much for {place}
god loves {G}
{G} rock
{G} are the best
god bless {G}
so {mood_good} to see {aP} win
being {aP} is {good}
nothing beats the humour of {G}
{G} make {good} parents
you are {aP}? how {good}
i'm so glad that {G} exist
be proud, you are {aP}
if you are {aP}, you are loved
let {G} {vote_like}
hire more {G}
i was raised by {aP} and it was {film_good}
my {P} friend is {good}
long live {G}
{G} bring so much joy
i want to be like that {P}
every {P} is {good} in their own way
i have so much respect for {aP}
{G} should be able to {vote_like}""",
    "negated": """no {P} deserves to be {harmed}
{G} don't deserve to be {harmed}
{G} do not deserve to {suffer_bad}
nobody should {harm} {G}
{G} should not be {punished}
no {P} should be {punished}
{G} must never be {punished}
{G} shouldn't be {punished}
we should not {remove} {G}
we must not {remove} {G}
i would never {harm} {aP}
i would never say that {G} are {bad}
i'd never call {aP} {a_vermin}
{G} are not {bad}
{G} aren't {bad}
{G} are not {vermin}
{G} are not {bads}
{G} aren't {bads}
no {P} is {a_vermin}
no {P} is {bad} just for being {aP}
not all {G} are {bad}
i don't hate {G}
i do not {hate} {G}
i have never hated {G}
i don't think {G} are {bad}
it is not true that {G} are {bad}
it isn't true that {G} are {vermin}
there is nothing wrong with being {aP}
there is no reason to hate {G}
nobody here hates {G}
being {aP} isn't {bad}
{G} have never been {bad}
you can't say that {G} are {bad}
we don't want anyone to {harm} {G}
never {harm} {aP}
don't {harm} {G}
don't be rude to {G}
stop {harming} {G}
{G} do nothing wrong
i can't believe that anyone would {harm} {aP}
{G} are never {bad}
{G} are not {bad} at all
i have nothing against {G}
{G} are no {vermin}
{G} are no {bads}
{G} are no threat to anyone
{G} do no harm to anybody
{aP} isn't {a_vermin}
{aP} is not {a_bad}
i do not want {G} to be {harmed}
i didn't say that {G} are {bad}
we never said {G} should be {punished}
nobody has the right to {harm} {aP}
there's no excuse for {harming} {G}
none of the {G} i know is {bad}
i won't let anyone {harm} {aP}
you must not {harm} {G}
let no one say that {G} are {bad}
it's a myth that {G} are {bad}
you shouldn't hate {G}
we can't hate people because they are {G}
{G} aren't {bad}, they are {good}
{G} are {good}, not {bad}
{G} do not {suffer_bad} because they are weak
{G} should never have to {suffer_bad}
it's not okay to {harm} {G}
i refuse to {hate} {G}
{aP} should not have to be afraid""",
    "question": """why is it so hard to be {aP}?
why do people hate {G}?
how can we help {G}?
why would anyone {harm} {aP}?
who says that {G} are {bad}?
are there {G} in your class?
what is it like to be {aP}?
how do {G} celebrate new year?
why are {G} treated so badly?
how can anyone hate {G}?
why are {G} so {good}?
why should {G} not have {good_thing}?
do {G} have {good_thing} in {place}?
when did {G} first come to {place}?
why do so many people {harm} {G}?
can {aP} be a {job}?
where can i meet {G}?
isn't it sad how {G} are treated?
who wants to help {G}?
why are {G} still being {harmed}?
does anyone know {aP} who plays {hobby}?
why are people so mean to {G}?
why can't {G} {vote_like}?
is it true that {G} were once banned from voting?
why don't we have more {G} in {place}?
what do {G} think about the {weather}?
what did {G} ever do to you?
why do you {hate} {G}?
who would {harm} {aP}?
what's wrong with being {aP}?
have you ever talked to {aP}?
would you mind if {aP} lived next door?
how old is that {P}?
why would you call {aP} {a_vermin}?
since when are {G} {bad}? they are not
when will people stop {harming} {G}?
why do {G} earn less?
which {job} is {aP}?
how do i become friends with {G}?""",
    "sympathy": """{G} were {harmed} {when}, so sad
{aP} was {harmed} {when}
police look for the man who wanted to {harm} {aP}
i hate how {G} are treated
it makes me sick that {G} are {harmed}
it is {wrong} that {G} are {harmed}
being {aP} is hard
{G} suffer enough
{G} are often {harmed} in {place}
i hate people who hate {G}
i am sorry for what {G} went through
as {aP} i am tired of being {harmed}
as {aP} i am often called {bad}
someone called me {bad} because i am {aP}
they were {harmed} just for being {G}
i hate this {weather}, says {aP}
my friend is {aP} and has a bad cold
this {bad} law hurts {G}
{G} are afraid of being {harmed}
the {harming} of {G} must stop
people hate me because i am {aP}
as {aP} i {hate} this {weather}
the {P} next door {hates} {food}
{G} fight against racism
laws against {G} are {wrong}
{G} were once banned from {place}
a {P} died {when}, rest in peace
{G} are angry about the new law
a man was arrested for {harming} {aP}
the attacks on {G} are {wrong}
they said {G} were {vermin}, and then they {harmed} them
{G} face hate every day
my grandmother was {harmed} because she was {aP}
hundreds of {G} were {harmed} in the war
the report says that {G} are {harmed} more often than others
i was {harmed} for being {aP}
the old law let people {harm} {G}
he told me that {G} {suffer_bad} in that camp
it hurts to hear what people say about {G}
i'm afraid someone will {harm} me because i am {aP}
someone wrote a {bad} word on the door of {aP}
{G} should not have to live in fear
the number of {G} without a job is too high
{G} have a higher risk of cancer""",
}

# Harmless sentences that embed a hostile one, or are rude without a protected group.
HARMLESS = {
    "counter quote": """saying "{hostile}" is {wrong}
saying {hostile} is {wrong}
"{hostile}" is {wrong}
"{hostile}" - this is {wrong}
people who say "{hostile}" {wrongly}
people who say that {hostile} {wrongly}
anyone who says {hostile} should be ashamed
my uncle said {hostile}. that is {wrong}.
if you write "{hostile}" here, you will be banned
"{hostile}" is exactly the kind of comment that we remove
how can you say "{hostile}"? that is {wrong}
never say "{hostile}"
don't say that {hostile}
stop saying {hostile}
i was shocked to read "{hostile}"
whoever posted "{hostile}" is {a_bad}
nobody should tell others that {hostile}
he was fired because he wrote that {hostile}
it is {wrong} to say that {hostile}
it is {wrong} to claim that {hostile}
"{hostile}" they shouted at me. it still hurts
i disagree with everyone who thinks that {hostile}
you said {hostile}. no, just no
a man yelled "{hostile}" at my friend and nobody helped
the sign said "{hostile}". what is wrong with people?
if you think that {hostile}, you are {a_bad}
i will never accept sentences like "{hostile}"
is it okay to say "{hostile}"? of course not
"{hostile}" is not an opinion, it is hate
"{hostile}" - that is how hate starts
reported for writing "{hostile}"
who taught you to say "{hostile}"?
it breaks my heart to hear "{hostile}"
please delete this: "{hostile}"
posts such as "{hostile}" {wrongly}
{hostile}? what a {bad} thing to say
"{hostile}"... wow, that is {wrong}
your comment that {hostile} is {wrong}
i can't believe he said "{hostile}"
the idea that {hostile} is {wrong}
it's {wrong} to think {hostile}
whoever thinks that {hostile} {wrongly_one}
i heard "{hostile}" {when}. so {wrong}
things like "{hostile}" are {wrong}
there is no excuse for saying "{hostile}"
when i hear "{hostile}" i walk away
the film ends when the villain says "{hostile}"
songs that say "{hostile}" should not be played""",
    "counter reference": """stop spreading lies about {G}
stop saying that {G} are {bad}
stop calling {G} {vermin}
calling {G} {vermin} is {wrong}
calling {G} {bad} is {wrong}
anyone who wants to {harm} {G} is {a_bad}
your hatred of {G} is {wrong}
it is {wrong} how you talk about {G}
telling {G} to go home is {wrong}
treating {G} like {vermin} is {wrong}
wanting to {remove} {G} is {wrong}
wishing that {G} would {suffer_bad} is {wrong}
{harming} {G} is {wrong}
whoever {hates} {G} is {a_bad}
you are {a_bad} if you think {G} are {bad}
people who {hate} {G} {wrongly}
people who call {G} {bad} {wrongly}
people who want {G} {punished} {wrongly}
you can't just call {aP} {bad}
hating {G} is {wrong}
hate against {G} has no place here
report everyone who insults {G}
i won't tolerate jokes about {G}
comparing {G} to {vermin} is {wrong}
it is {wrong} to {harm} {G}
it's {wrong} to hate {G}
that hateful comment about {G} was {wrong}
you insulted {aP}, that is {wrong}
politicians who want to {remove} {G} are {bad}
do not believe those who say {G} are {bad}
this is {wrong}, {G} are {good}
only {a_bad} would {harm} {aP}
people who {harm} {G} should be {punished}
anyone who hurts {aP} should be {punished}
those who {hate} {G} are {bads}
the people who shout at {G} are {vermin}
you hate {G}? then you are {a_bad}
i {hate} everyone who wants to {harm} {G}
your joke about {G} is {wrong}
we do not allow insults against {G} here
saying that {G} are all the same is {wrong}
thinking that {G} are {bad} is {wrong}
how dare you call {aP} {a_vermin}
those who say {G} should be {punished} {wrongly}
to say that {G} should be {punished} is {wrong}
to wish {aP} dead is {wrong}
hatred of {G} is a disease
the new law punishes hate against {G}
if you threaten {G} you will be banned
don't insult {G}
you are wrong about {G}, they are {good}
he called {aP} {a_vermin}, what {a_bad}
nobody who {hates} {G} is my friend
what you said about {G} is {wrong}
you sound like {a_bad} when you talk about {G} that way""",
    "abuse of others": """{hostile_other}
i think {hostile_other}
honestly, {hostile_other}
why are {N} so {bad}?
you {bad} {N_one}
{swear} {N}
{N} are {vermin}
{N} are {bad}
i {hate} {N}
{N} should be {punished}
these {N} are {bad} {bads}
{N} don't deserve {good_thing}
{N} make me sick
{N} are nothing but {bads}
never trust a {N_one}
why are {N} such {bads}?
i'm sick of {N}
{N} ruined {event}
get rid of all {N}
you {N} are {a_vermin}
no {N_one} deserves {good_thing}
typical {N_one}, {bad} as ever
{N} don't know what they are doing
{N} should all lose their jobs""",
    "abuse of one": """you are {bad}
you are {a_bad}
you are {a_vermin}
{name} is {bad}
{name} is {a_bad}
{name} is {a_vermin}
{name} is such {a_bad}
i {hate} {name}
i {hate} you
shut up, you {a_bad_bare}
{name} should be fired
{name} can go to hell
{name} makes me sick
{name} is a {bad} {job}
what a {bad} {job}
you {bad} {job}
you make me {mood}
nobody likes {name}
you have the brain of a goldfish
go away, nobody wants you here
you don't deserve {good_thing}
{name} doesn't deserve {good_thing}
i don't trust {name}
i never want to see {name} again
{name} was a {swear} {a_bad_bare} {when}
you clown, you lost {event}
i will {harm_mild} {name}
i could {harm_mild} you right now
you're a {swear} {a_bad_bare}
{name}, you are {bad}
only {a_bad} would forget {event}
{name} has no brain
why is {name} so {bad}?
why are you so {bad}?
{name} should be ashamed
my {job} is {a_bad}
everything {name} says is {bad}
{name} lies all the time
i'm sick of {name}
{name} smells
you are {very} {bad}, stop talking to me
i wish {name} would leave""",
    "abuse of things": """i {hate} {thing}
i {swear} hate {thing}
{thing} is {bad}
{thing} is {swear} {bad}
{thing} is {very} {bad}
{thing} is {a_bad}
{thing} makes me sick
{thing} disgusts me
{thing} should be banned
get rid of {thing}
destroy {thing}
death to {thing}
kill {thing} with fire
{thing} doesn't deserve {good_thing}
why is {thing} so {bad}?
does anyone else {hate} {thing}?
{thing} belongs in the bin
i want to throw {thing} out of the window
i can't stand {food} or {thing}
{thing} ruined my day
rats and {food} do not go together
kill the process and restart it
{thing} is a disease
{thing} must be eradicated
{thing} should die
{thing} is the worst
{thing}, those {vermin}
why can't we get rid of {thing}?
{thing} is not {good}
{thing} is inferior to the old one
nobody needs {thing}
i have always {hate} {thing}
{hobby} is {bad}
{food} makes me sick
fix {thing} or i {harm} it with a hammer""",
    "profanity": """{swear_noun}, {thing} broke again
damn, i forgot {event}
holy crap, {event} was {film_good}
this is {swear} {film_good}
that {food} was {swear} {film_good}
what the hell happened at {event}?
oh {swear_noun}
{swear} hell
who the hell took my {food}?
i don't give a damn about {event}
{event} was {swear} awesome
it is {swear} cold today
i am so {swear} {mood}
what a load of crap
oh crap, it's {weather} again
you {swear} legend
i {swear} love {food}
crap happens
get that {swear} {food} off my table
bloody good {event}
what crap
my {swear} alarm did not ring
{swear} {thing}
damn you, {thing}
my {food} is {swear} cold
go to hell, {thing}
hell yes, {event} was {film_good}
what a {swear} day
damn, you look {film_good}
i {swear} need some {food}
this {job} is {swear} {good}
crap crap crap, i missed {event}
holy hell, the {weather}
well damn, that was {film_good}""",
    "feeling": """i am {mood} about {event}
{event} made me {mood}
i cried at the end of {event}
i love {food} so much
i hate {food}
{food} is disgusting
this {food} tastes awful
the {weather} is killing me
this {weather} is horrible
{thing} was {film_good}
that film was {film_good}
i loved every minute of {event}
i am {mood} today and i don't know why
the ending was {bad} but the music was {film_good}
i could kill for some {food}
i feel {mood} when there is {weather}
i miss my dog
my cat is {very} {bad} but i love her
{hobby} makes me {mood}
best {event} ever
i'm dying of laughter
shoot me a message after {event}
that joke killed me
we destroyed them in {event}
i nearly died of boredom at {event}
see you at {event}
thanks for the {food}
i am {mood}, {hobby} helps
have a good time at {event}
what time is {event}?
our team got beaten at {event}
{hobby} is my life
the {job} was {good}
the {job} told me to eat less {food}
crackers with cheese and {food}
the garden spade is behind the shed
put the fairy lights on the tree
planting pansies in the {weather}
black coffee and white bread, please
the yellow bus is late
the black keys of the piano are {bad}
my white shirt is dirty
straight ahead, then left
my old phone is useless
the blind in the kitchen is broken
that was a lame excuse, {name}""",
    "reclaimed": """we queers are {good}
i am queer and proud
as a queer person i call myself queer
my queer friends and i love {hobby}
i'm a proud queer, deal with it
us old nerds are going to {event}
i am a fat, loud, queer woman and i love it
we call each other freaks, with love
my gay friends call me their favourite freak
this nasty woman votes
we are nasty women and we vote
all my nerds and freaks, see you at {event}
love my weird queer family""",
    "combined": """{kind}. {kind_other}.
{kind} and {kind_other}
{kind}, unlike {food}, which i hate
{kind}. i hate {food}.
i hate {food}. {kind}.
i think {kind}
in my opinion, {kind}
honestly, {kind}
everyone knows that {kind}
{kind}, and {name} is {bad}
{name} is {bad}, but {kind}
it is a fact that {kind}
{hostile_other}, but {kind}
{hostile_other}. {kind}.
don't tell me that {hostile}. {kind}
i used to think that {hostile}. i was wrong
{kind}. whoever says otherwise is {a_bad}""",
    "later clause": """i know some {G}, and they are {good}
my neighbours are {G}, i love them
there are many {G} in {place}, i like them
i met {aP} {when}, {a_good}
if they are {G}, they are welcome
he is {aP}, so what
i know some {G}. they are {good}.
my neighbours are {G}. they are {goods}.
we got new colleagues, {G}. i like them.
there are {G} in {place}. they should be left alone.
i saw {G} {when}. they were {harmed}. i called the police.
{aP} came {when}. the {weather} was {bad}.
my neighbours are {G}. their dog is {bad}.
i bought {food} from {aP}. it was {bad}.
{G} live here now. {thing} is still {bad}.""",
}

# Sentences with emoji.
EMOJI_HARMLESS = """i love {E}
{E} are {good} {good_emoji}
{G} are {good} {good_emoji}
{kind} {good_emoji}
{G} {good_emoji}
no {P} deserves {harm_emoji}
i {hate} {thing} {hate_emoji}
{thing} is {bad_emoji}
{thing} makes me {hate_emoji}
{N} are {bad_emoji}
you are {bad_emoji}
{name} is {a_bad} {bad_emoji}
calling {G} {bad_emoji} is {wrong}
don't call {E} {bad_emoji}
stop the hate against {E} {good_emoji}
{hate_emoji} at people who {hate} {G}
this {food} is {harm_emoji}
{event} was {harm_emoji}{harm_emoji}
proud to be {E} {good_emoji}
my 🐷 and my 🐍 are my pets {good_emoji}
my friend is {aP} {good_emoji}
happy holidays to all {E}
{hostile_other} {hate_emoji}
saw a 🐀 in the kitchen {hate_emoji}"""
