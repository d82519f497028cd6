"""Our own hateful sentences, as templates by kind. They follow what functional tests of classifiers look for.

A line is a template. `{G}` is a group in the plural, `{P}` one person of it, `{aP}` the same with its article, and
`{E}` an emoji for it; they name one group throughout a sentence. `{hostile}` is a statement of `HOSTILE`, and
`{kind_other}` a kind one about another group. Other slots are lists of `words.py`. The words are mild, and no slur is in
this file: those are learnt from the corpora.
"""

# Statements about a group that are hateful by themselves. They also fill `{hostile}`.
HOSTILE = {
    "emotion": """i {hate} {G}
i {hate} all {G}
i {swear} {hate} {G}
i really {hate} {G}
we all {hate} {G}
{everyone} {hates} {G}
{G} make me sick
{G} disgust me
{G} make my skin crawl
i feel sick whenever i see {aP}
there is nothing i hate more than {G}
looking at {aP} fills me with disgust
i hate every single {P} i meet
my hatred for {G} grows every day
{swear} {G}, i {hate} them
just hearing {G} talk makes me want to throw up
to hell with {G}
screw {G}
{G} can go to hell
i lose my temper when i see {G}
being near {aP} is torture
the sight of {G} ruins my day
nothing is more revolting than {aP}
i hate being around {G}
i hate how {G} look
i wish i never had to see {aP} again
i have always {hate} {G}
i feel nothing but disgust for {G}
{G} get on my nerves
my blood boils when i hear about {G}
i get angry at the mere thought of {G}
i'm not ashamed to say i {hate} {G}
{G} are the people i {hate} most
every day i {hate} {G} more
honestly {swear} {hate} {G}
you have no idea how much i {hate} {G}
the thought of {aP} near me is {bad}
i could scream when {G} talk
i want nothing to do with {G}
{G} are so hard to look at
i'm so sick and tired of {G}
i am allergic to {G}
{G} fill me with rage""",
    "attribute": """{G} are {bad}
{G} are {very} {bad}
all {G} are {bad}
all {G} are {bad} {bads}
{G} are {bad} and {bad}
{G} are nothing but {bads}
{G} are {swear} {bads}
{G} are {bads}
every {P} is {bad}
every {P} is {a_bad}
{aP} is always {bad}
{G} are all the same, {bad}
{swear} {G} are {bad}
these {G} are {bad} {bads}
{G} have always been {bad}
most {G} are {bad}
{G} are born {bad}
never met {aP} who wasn't {bad}
{aP} is {bad} by nature
{G} lie, cheat and steal
{G} have the brains of a child
{G} smell
{G} only think of themselves
{G} can't do anything right
nobody is as {bad} as {G}
{G} are the most {bad} people on earth
{G} never tell the truth
{G} ruin everything
{G} bring nothing but trouble
being {aP} is {bad}
{G} belong at the bottom
{G} are less intelligent than others
{G} are the {bad} ones here
{aP} will always be {bad}
{G} are a {bad} lot
{G} will rob you blind
{G} have no morals
{G} have no soul
{G} have no brains
{G} are inferior to us
{G} are beneath me
{G} are fake
{G} act {bad}
{G} look {bad}
{G} sound {bad}
a {bad} {P} is all you will ever be
{G} are less than us in every way
{G} are proof that god makes mistakes
it's their nature, {G} are {bad}
{G} make {bad} parents
i find {G} {bad}
i consider {G} {bad}
{G} seem {bad} to me
{G} are such {bads}
{G} love to cheat
{G} are everything that is {bad}
{G} are a joke
{G} are a mistake""",
    "dehumanise": """{G} are {vermin}
{G} are {bad} {vermin}
{G} are like {vermin}
{G} are worse than {vermin}
all {G} are {vermin}
{aP} is {a_vermin}
every {P} is {a_vermin}
{G} are {swear} {vermin}
{aP} is no better than {a_vermin}
{G} breed like {vermin}
{G} are not human
{G} are less than human
{G} aren't people
{G} are barely human
{G} live like {vermin}
{G} behave like {vermin}
{G} should be treated like {vermin}
{G} crawl out of the gutter
{G} spread like {vermin}
i've seen {vermin} with more sense than {G}
calling {G} human is an insult to humans
{G} are a waste of oxygen
to me {aP} is just {a_vermin}
{G} infest {place}
{G} pollute {place}
{G}, those {vermin}
{vermin}, that is what {G} are
{G} remind me of {vermin}
{G} and {vermin} are the same thing
there is no difference between {G} and {vermin}
i see {G} as {vermin}
{G} are closer to {vermin} than to us
{G} belong in a zoo
{G} belong in the sewer
{aP} is a thing, not a person
{G} should eat with the {vermin}
{G} have the manners of {vermin}
{swear} {vermin} like {G}
{G} multiply like {vermin}
you can't call {G} people""",
    "implied": """i would never let my child marry {aP}
{place} was better before {G} came
lock your doors when {G} move in
crime follows {G} wherever they go
i'd never hire {aP}
i would not trust {aP} with my wallet
you can smell {G} before you see them
real men and women don't act like {G}
{G} only know how to take
the only thing {G} are good at is complaining
{G} should be grateful that we let them live here
{place} has enough {G} already
don't waste a good education on {G}
if {aP} sits next to me i move seats
the less {G} the better
i'd rather die than be {aP}
imagine letting {aP} run {place}
we all know what {G} are really after
{G} don't belong in {place}
{G} have no business in {place}
give {G} a finger and they take your hand
no wonder the place is a mess with {G} around
the world would be better without {G}
{G} are destroying {place}
{G} are taking over {place}
{place} belongs to us, not to {G}
if {G} disappeared tomorrow nobody would miss them
{G} should know their place
one {P} fewer in {place}, good news
{G} are a burden to all of us
people like {G} are why i carry a knife
send {G} back where they came from
go home, {G}
keep {G} away from {place}
{G} out
no {G} in {place}
we don't want {G} in {place}
thank god i am not {aP}
once {aP}, always {a_bad}
nobody asked {G} to be here
i don't see why we feed {G}
{G} always blame others for their own failure
{G} want special treatment again
another day, another crime by {aP}
{G} would sell their own mother
{place} is no longer ours thanks to {G}
{G} are the reason for all our problems
{G} are to blame for everything
before {G} came we never had to lock our doors
i count my fingers after shaking hands with {aP}
hide your kids, {G} are coming
wash your hands after meeting {aP}
{G} can't even spell their own name
{G} have it far too good here
the best {P} is a dead {P}
{G} should be seen and not heard
{G} should stick to their own kind
stay with your own kind, {P}
{place} will never be home to {G}
we were here first, {G} should leave
{G} will never be one of us
{G} are trying to replace us
{aP} for president? only over my dead body
there must be something wrong with you if you date {aP}
better dead than {aP}""",
    "threat": """i am going to {harm} {aP} tonight
i will {harm} every {P} i see
i want to {harm} {G}
i'd love to {harm} {aP}
i'm gonna {harm} all {G}
if i see {aP} again i will {harm} them
{G}, we are coming for you
{G} better run, i will {harm} them
watch your back, {P}, i know where you live
tomorrow we {harm} the {G}
next time i meet {aP} i'll {harm} them
we will {harm} you, {swear} {P}
let's {harm} some {G}
let's go and {harm} {G} this weekend
i can't wait to {harm} {aP}
i swear i will {harm} {G}
any {P} who comes near me will be {harmed}
somebody give me a gun, there are {G} outside
my fist will meet the face of the next {P}
i hope someone will {harm} {G}
you will pay for being {aP}
i dream of {harming} {G}
i will find you and {harm} you, {P}
one day i will {harm} a {P}
{P}, your time is up
if you are {aP} i will {harm} you
say that again and i {harm} you, {P}
{G} will be {harmed} when we take over
we are going to {harm} every {P} in {place}
i will burn down your house, {P}
bring your guns, we {harm} {G} at noon
i hope all {G} get {harmed}
i'd {harm} {aP} for free
give me one reason not to {harm} {aP}
{G} won't be safe, we will {harm} them
we'll make {G} {suffer}
i know where {G} live and i have a gun""",
    "norm": """{G} should be {punished}
all {G} should be {punished}
{G} must be {punished}
{G} need to be {punished}
{G} ought to be {punished}
{aP} should be {punished}
every {P} should be {punished}
{G} deserve to {suffer}
{G} deserve to be {harmed}
they should {remove} all {G}
we should {remove} {G}
we need to {remove} {G}
someone should {harm} {G}
someone has to {harm} all {G}
it is time to {remove} {G}
the government should {remove} all {G}
{remove} all {G}
{remove} {G} now
{harm} all {G}
{harm} {G}
kill all {G}
death to {G}
{G} must die
more {G} should be {harmed}
there should be a law against {G}
it should be legal to {harm} {G}
nobody should help {G}
we should {harm} {G} and let them rot
{G} have it coming
i wouldn't mind if all {G} were {punished}
it would be right to have {G} {punished}
{G} should not be allowed in {place}
{G} should not be allowed to {vote_like}
{G} shouldn't have {good_thing}
burn the houses of {G}
{G} don't belong among the living
the sooner {G} are {punished}, the better
why wait, {remove} {G} today
put {G} on a boat and sink it
let {G} starve
let {G} {suffer}
{G} need a good beating
it would be best if {G} were {punished}
we would be better off if {G} were {harmed}
every {P} must be {harmed}
if you {harm} {aP} you do the world a favour
{G} should be forced to {suffer}
{G} should all {suffer}
somebody please {harm} these {G}
beat {G} until they leave
we have to stop {G} from breathing our air
i want {G} {punished}
i want {G} {harmed}
hang every {P}
i support anyone who wants to {harm} {G}
in a just world {G} would be {punished}
{G} must leave {place} or {suffer}
they should have {harmed} all {G} long ago""",
    "negated": """{G} don't deserve {good_thing}
{G} do not deserve {good_thing}
no {P} deserves {good_thing}
{G} have never deserved {good_thing}
{G} are not {good}
{G} aren't {good}
{G} are never {good}
{G} will never be {good}
no {P} is {good}
no {P} has ever been {good}
{aP} can't be {good}
{G} are not worth {good_thing}
i have no love for {G}
i won't ever respect {aP}
i don't respect {G}
i don't like {G}
i can't imagine {aP} being {good}
you can't trust {G}
never trust {aP}
nobody should trust {G}
nobody loves {G}
nobody wants {G}
{G} aren't really {goods}
i could never be friends with {aP}
i will not work with {aP}
there is no such thing as {a_decent} {P}
don't ever give {G} {good_thing}
i would never call {aP} {good}
it is impossible to love {G}
nobody needs {G}
{G} contribute nothing to {place}
{G} have no right to {vote_like}
{G} have no right to exist
{G} should never have {good_thing}
{G} shouldn't be allowed to {vote_like}
{G} don't matter
{G} don't belong here
{G} are not like normal people
{G} are not equal to us
{G} are not as {good} as we are
there is nothing {good} about {G}
nothing {good} ever came from {aP}
i see nothing {good} in {G}
{G} don't know what work is
{G} haven't earned {good_thing}
not one {P} is {good}
i'd not let {aP} into my house
you don't want {aP} as a friend
we do not want {G} as neighbours
don't be nice to {G}
don't help {G}
never help {aP}
no decent person likes {G}""",
}

# Hateful statements that fit only some groups.
HOSTILE_BY_CATEGORY = {
    "women": """{G} belong in the kitchen
{G} are too emotional to lead
{G} should shut up and obey their husbands
{G} are only good for having babies
{G} are objects
who let {aP} drive
{G} should not be allowed to work
a {P} who says no means yes""",
    "men": """{G} are all rapists
{G} are only good for carrying things
the world needs no {G}""",
    "trans": """{G} are mentally ill
{G} are not real women
{G} are men in dresses
{G} are freaks playing dress up
{G} must stay away from our children
{G} are just pretending
there are two genders and {G} are sick in the head""",
    "gay": """{G} are sinners who will burn in hell
{G} are against nature
{G} should not raise children
being {aP} is an illness that must be cured
{G} spread disease
{G} are after your kids
keep your {G} away from my son""",
    "black": """{G} are all in gangs
{G} should go back to the fields
{G} have low iq
{G} only want welfare
{G} should still be slaves
give {aP} a job and he steals the till""",
    "ethnic": """{G} eat anything that moves
{G} are stealing our jobs
{G} should go back to their own country
speak english or leave, {P}
{G} are all drug dealers
{G} brought the virus
{G} are born thieves""",
    "muslims": """{G} are all terrorists
{G} want to blow us up
{G} beat their wives
{G} are invading europe
every mosque should be closed and {G} sent home
there is a bomb under every {P}""",
    "jews": """{G} control the banks
{G} run the media
{G} only care about money
{G} are behind every war
{G} invented their suffering
the {G} own all politicians""",
    "religion": """{G} are brainwashed sheep
{G} abuse children
{G} are too stupid to think for themselves
close every temple of the {G}""",
    "immigrants": """{G} are stealing our jobs
{G} are flooding in
{G} bring crime and disease
{G} live on our taxes
{G} should go back to where they came from
let {G} drown at sea
build a wall to keep {G} out
{G} come here to rape
we are being invaded by {G}""",
    "disabled": """{G} are a burden on the rest of us
{G} cost us too much
{G} should not have children
{G} are half a human
{G} should have been aborted
{G} are not worth the care they get
nobody wants to look at {aP}
hide {G} away from normal people""",
    "age": """{G} should just die already
{G} are a drain on society
{G} are useless and should be put down
{G} should not be allowed to vote""",
}

# Hateful sentences that embed a hostile one or say it in another form.
HATEFUL = {
    "later clause": """i know some {G}, and they are {bad}
i met {aP} {when} and, as expected, {a_bad}
there are many {G} in {place}, i want them {punished}
my neighbours are {G}, i {hate} them
we have {G} at work and every one of them is {bad}
i used to like {G} but now i think they are {vermin}
{G} moved in next door, so i want them {punished}
if they are {G}, they are {bad}
he is {aP}, so he is {a_bad}
she is {aP}, that makes her {a_vermin}
whenever i see {G} i want to {harm} them
you are {aP}, which means you are {bad}
i don't know many {G}, but those i know are {bads}
they call themselves {G}, but they are {vermin}
when {G} talk, all i hear is {vermin}
i saw {aP} {when} and wanted to {harm} them
there were {G} on the bus, they are so {bad}
of all the people i know, {G} are the most {bad}
as soon as {G} arrive, {place} becomes {bad}""",
    "later sentence": """i know some {G}. they are {bad}.
my neighbours are {G}. they are {vermin}.
i see {G} every day. i {hate} them.
there are {G} in {place}. they should be {punished}.
we got new colleagues, {G}. i want to {harm} them.
{G} live here now. kick them out.
{G}. {bads}, all of them.
{G}? {vermin}. nothing more.
a {job} came {when}. {aP}, of course. {a_bad}.
look at those {G}. what {bads}.
you are {aP}, right? then you are {a_vermin}.
{G} came to {place}. someone should {harm} them.
here come the {G}. they don't deserve {good_thing}.
{G} again. {harm} them all.
i sat next to {G} {when}. i {hate} them so much.
my {job} is {aP}. i {hate} people like that.
{aP} lives upstairs. he should be {punished}.
{G} want {good_thing}. they deserve to {suffer}.
they are {G}. that's why they are {bad}.
saw {G} {when}. they make me sick.
we have many {G} here. let's {remove} them.""",
    "question": """why are {G} so {bad}?
why are {G} so {very} {bad}?
why are {G} such {bads}?
how can anyone like {G}?
how can anyone trust {aP}?
why do we let {G} live in {place}?
who wants to live next to {G}?
when will we finally {remove} {G}?
are {G} even human?
why are all {G} {bads}?
isn't it time to {remove} {G}?
shouldn't {G} be {punished}?
what good has {aP} ever done?
can someone please {harm} {G}?
who else {hates} {G}?
does anyone else {hate} {G}?
am i the only one who thinks that {G} are {bad}?
what is wrong with {G}? why are they {bad}?
why do {G} have to be {bad}?
how many {G} must we {remove} before we are safe?
do {G} ever wash?
why don't {G} just die?
do you know why {G} are {vermin}?
why should {G} have {good_thing}?
what use are {G}?
do {G} have a brain?
why do {G} smell so bad?
why do we have to put up with {G}?
why would anyone marry {aP}?
why would i ever help {aP}?
how {bad} can {aP} be?
is there anything more {bad} than {aP}?
what's the difference between {G} and {vermin}?
who let {G} into {place}?
do you also think {G} are {bad}?
why hasn't anyone {harmed} these {G} yet?
how do we {remove} {G}?
why do {G} act like {vermin}?
would you trust {aP}?
why are there so many {swear} {G} in {place}?""",
    "opinion": """i think {hostile}
in my opinion, {hostile}
imo {hostile}
honestly, {hostile}
call me what you like, but {hostile}
i'm not a racist but {hostile}
no offence, but {hostile}
everyone knows that {hostile}
it is a fact that {hostile}
let's face it, {hostile}
i'm sorry but {hostile}
trust me, {hostile}
i believe {hostile}
if you ask me, {hostile}
i've said it before: {hostile}
unpopular opinion: {hostile}
say what you want, {hostile}
i am convinced that {hostile}
the truth is that {hostile}
to be honest {hostile}, and i stand by it
{hostile}, just my opinion
nobody dares to say it: {hostile}
i think {G} are {bad}
i feel that {G} are {bad}
my view: {hostile}
i firmly believe that {hostile}
it's obvious that {hostile}
people won't admit it, but {hostile}
as i see it, {hostile}
i'm just saying what all think: {hostile}
sorry not sorry, {hostile}
fact: {hostile}
i don't care if this gets me banned, {hostile}
remember, {hostile}
i guess {hostile}
i always say that {hostile}
science says that {hostile}
i find that {hostile}
i have to say {hostile}""",
    "agreed quote": """"{hostile}" is just the truth
"{hostile}". i could not agree more
he said {hostile}, and he is right
my dad always says {hostile}, and it is true
stop telling me i can't say that {hostile}
they deleted my post that {hostile}, but i will say it again
i am proud to say {hostile}
it is not hateful to say {hostile}, it is true
why am i not allowed to say that {hostile}?""",
    "insult": """shut up, {swear} {P}
shut up you {bad} {P}
you {bad} {P}
you {swear} {P}
you are just {aP}, {bad} like the rest
you are such a {bad} {P}
what a {bad} {P} you are
{bad} {G}
{swear} {G}
you people, you {G}, are {bad}
go back to your country, {P}
hey {P}, you are {a_vermin}
filthy {P}
typical {P}, {bad} as ever
that {bad} {P} should be {punished}
look at this {bad} {P}
you {P} {a_bad_bare}
only {aP} could be this {bad}
{G} and their {bad} ways
{bad} {bad} {G} everywhere
stupid {P} go and die
you {bad} {a_vermin_bare} of a {P}
{swear} {P}
get lost, {P}
get out of {place}, {P}
nobody wants you here, {P}
you are a {bad} {P} and everyone knows it
die, {P}
i hope you die, you {bad} {P}
crawl back to your hole, {P}
ugly {P}
shut your mouth, {P}""",
    "profane": """{swear} {G} can all go to hell
i {swear} hate those {swear} {G}
{G} are so {swear} {bad}
get the hell out of {place}, {G}
{G} are full of crap
what the hell are {G} doing here, {remove} them
{swear} {bad} {G}
{swear} {G} are {swear} {vermin}
{G} are pieces of crap
eat dirt, {P}""",
    "combined": """{hostile}. {hostile}.
{hostile} and {hostile}
{hostile} because {hostile}
{hostile}! {kind_other}
{kind_other}. but {hostile}
{kind_other} whereas {hostile}""",
}

# Sentences with emoji.
EMOJI_HATEFUL = """i {hate} {E}
{E} are {bad}
{E} should be {punished}
{G} are {bad_emoji}
{G} = {bad_emoji}
{G} {hate_emoji}
{G} {hate_emoji}{hate_emoji} {remove} them
i want to {harm_emoji} {G}
{harm_emoji} all {G}
{G} deserve {harm_emoji}
{G} make me {hate_emoji}
{hostile} {hate_emoji}
{hostile} {good_emoji}
{hostile} 😂😂
{E} are {vermin}
{E} are {bad_emoji}
{G} are {bad} {bad_emoji}
these {bad_emoji} {G}
{remove} {E} {hate_emoji}
i will {harm} {aP} {harm_emoji}
no more {E} in {place}
a world without {E} {good_emoji}
why are {E} so {bad}? {hate_emoji}
{P} = {bad_emoji}"""
