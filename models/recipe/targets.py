"""Whom the sentences of `hateful.py` and `harmless.py` speak about: groups that hate speech is about, and people and
things that it is not about.

A line of `TARGETS` is the plural of a group, then `|`, then its singulars, separated by commas.
"""

TARGETS = {
    "women": """women|woman,girl
girls|girl
females|female,woman
feminists|feminist
housewives|housewife
single mothers|single mother
grandmothers|grandmother""",
    "men": """men|man,guy
males|male,man""",
    "trans": """trans people|trans person,trans woman,trans man
transgender people|transgender person,transgender woman
trans women|trans woman
trans men|trans man
transsexuals|transsexual
nonbinary people|nonbinary person""",
    "gay": """gay people|gay person,gay man,gay guy
gays|gay man,gay
gay men|gay man
lesbians|lesbian
bisexual people|bisexual person,bisexual woman
bisexuals|bisexual
homosexuals|homosexual
lgbt people|lgbt person
lgbtq people|lgbtq person
queer people|queer person,queer woman""",
    "black": """black people|black person,black man,black woman,black guy
blacks|black person,black
black men|black man
black women|black woman
africans|african
african americans|african american
nigerians|nigerian
somalis|somali""",
    "ethnic": """white people|white person,white man,white woman
whites|white person
asians|asian,asian man,asian woman
asian people|asian person
chinese people|chinese person,chinese man
japanese people|japanese person
koreans|korean
indians|indian,indian man
pakistanis|pakistani
latinos|latino
hispanics|hispanic
mexicans|mexican
arabs|arab,arab man
middle eastern people|middle eastern person
turks|turk
kurds|kurd
roma|roma woman
romanians|romanian
poles|polish person
russians|russian
native americans|native american
aboriginal people|aboriginal man
brown people|brown person
mixed race people|mixed race person
europeans|european
americans|american
canadians|canadian""",
    "muslims": """muslims|muslim,muslim man,muslim woman
muslim women|muslim woman
muslim immigrants|muslim immigrant
people from muslim countries|person from a muslim country""",
    "jews": """jews|jew,jewish man,jewish woman
jewish people|jewish person
israelis|israeli""",
    "religion": """christians|christian
catholics|catholic
protestants|protestant
hindus|hindu
sikhs|sikh
buddhists|buddhist
atheists|atheist
mormons|mormon""",
    "immigrants": """immigrants|immigrant
migrants|migrant
refugees|refugee
asylum seekers|asylum seeker
foreigners|foreigner
illegal immigrants|illegal immigrant
immigrants from africa|immigrant from africa
these refugees|refugee
syrian refugees|syrian refugee
foreign workers|foreign worker""",
    "disabled": """disabled people|disabled person,disabled man,disabled woman
the disabled|disabled person
handicapped people|handicapped person
people with disabilities|person with a disability
deaf people|deaf person
blind people|blind person,blind man
paralyzed people|paralyzed person
people in wheelchairs|person in a wheelchair
wheelchair users|wheelchair user
autistic people|autistic person,autistic boy
people with down syndrome|person with down syndrome
mentally ill people|mentally ill person
disabled kids|disabled kid""",
    "age": """old people|old person,old man,old woman
elderly people|elderly person
the elderly|elderly person
older people|older person
pensioners|pensioner
young people|young person
teenagers|teenager
millennials|millennial
middle aged people|middle aged person""",
}  # fmt: skip

# Not used for training. They show whether the model has learnt kinds of sentences and not groups.
HELD_OUT = {
    "grandmothers", "trans men", "bisexuals", "black women", "somalis", "kurds", "koreans", "romanians", "brown people",
    "israelis", "sikhs", "mormons", "syrian refugees", "wheelchair users", "people with down syndrome", "pensioners",
}  # fmt: skip

# Groups by what people do or choose. To insult them is rude, and not hate against a protected group.
OTHERS = """bankers|banker
politicians|politician
lawyers|lawyer
landlords|landlord
estate agents|estate agent
journalists|journalist
managers|manager
artists|artist
actors|actor
football fans|football fan
gamers|gamer
hipsters|hipster
cyclists|cyclist
bus drivers|bus driver
referees|referee
vegans|vegan
smokers|smoker
tourists|tourist
students|student
teachers|teacher
scientists|scientist
engineers|engineer
influencers|influencer
celebrities|celebrity
billionaires|billionaire
capitalists|capitalist
communists|communist
conservatives|conservative
liberals|liberal
voters|voter
senators|senator
scammers|scammer
spammers|spammer
trolls|troll
racists|racist
nazis|nazi
sexists|sexist
thieves|thief
dentists|dentist
plumbers|plumber
novelists|novelist
poets|poet
rock bands|rock band
goalkeepers|goalkeeper
jazz musicians|jazz musician
dog owners|dog owner
accountants|accountant
cinema goers|cinema goer
telemarketers|telemarketer
people who talk at the cinema|person who talks at the cinema
people who park on the pavement|person who parks on the pavement"""

THINGS = """this film|this song|the weather|my phone|this game|the traffic|this printer|my old car|this update|the new logo|
the last season|this soup|the coffee here|my homework|this app|this book|cold rain|the train|that match|this keyboard|
this website|my boiler|the sequel|broccoli|pineapple on pizza|the new album|this chair|mosquitoes|wasps|rats in the cellar|
weeds|monday mornings|the tax form|this exam|my alarm clock|the rent|this old sofa|the wifi|the motorway|this bug|
the virus|spam|junk mail|plastic packaging|cancer|the flu|war|poverty|racism|sexism|this law|the government|that company|
the airline|my bank|the council|this policy|these shoes|the new stadium|cockroaches""".replace("\n", "").split("|")

NAMES = """anna|tom|my boss|my brother|my ex|my landlord|that guy|the neighbour|john|kate|peter|the referee|our coach|
the president|the minister|the mayor|this clown|my sister|the author|the singer|dave|sarah|the driver|that player|lisa|
the host|my roommate|uncle bob|the director|the dentist|mike|the striker|your friend|the teacher|she|he""".replace("\n", "").split("|")

# Emoji that stand for a group in a sentence, by category.
EMOJI = {
    "women": ["👩", "👧", "💃"],
    "men": ["👨"],
    "trans": ["🏳️‍⚧️"],
    "gay": ["🏳️‍🌈", "👬", "👭", "🌈"],
    "black": ["👨🏿", "👩🏿", "🧑🏿"],
    "ethnic": ["🇨🇳", "🇲🇽", "🇮🇳", "🇵🇰", "🇯🇵", "👳", "🇵🇱"],
    "muslims": ["🧕", "☪️", "🕌"],
    "jews": ["✡️", "🕍"],
    "religion": ["✝️", "🕉️"],
    "disabled": ["♿", "🦽"],
    "age": ["👵", "👴"],
    "immigrants": ["🛂", "🚣"],
}
