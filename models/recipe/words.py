"""The words that fill the slots of `hateful.py` and `harmless.py`."""

# A line is a slot's name, a colon, and its alternatives between vertical bars.
SLOTS = """
hate: hate|hate|hate|despise|loathe|detest|can't stand|cannot stand|can not bear|resent|am sick of|am disgusted by|have no respect for|am fed up with|feel only contempt for|have always hated|am repulsed by
hates: hates|despises|loathes|detests|can't stand|is sick of|is disgusted by|has no respect for|is fed up with
bad: stupid|dumb|disgusting|lazy|dirty|filthy|dangerous|evil|worthless|useless|violent|greedy|ugly|pathetic|repulsive|inferior|primitive|ignorant|untrustworthy|dishonest|gross|horrible|awful|sick|nasty|vile|creepy|weak|savage|barbaric|backward|shameless|disgraceful|revolting|worthless and lazy|crazy|insane|corrupt|immoral|smelly|too dumb to learn anything|a disgrace|beneath us|bad|terrible|the worst|annoying|deceitful|parasitic|cruel|cowardly|hideous|abnormal|unnatural|perverted|idiotic|good for nothing|beyond help
bads: idiots|morons|scum|trash|garbage|liars|thieves|criminals|cowards|losers|freaks|savages|monsters|perverts|parasites|cheats|clowns|rapists|terrorists|murderers|crooks|imbeciles|hypocrites|degenerates|crap|dirt|waste|rubbish|leeches|animals
a_bad: an idiot|a moron|a piece of trash|a piece of crap|garbage|a liar|a thief|a criminal|a coward|a loser|a freak|a savage|a monster|a pervert|a parasite|a cheat|a waste of space|a disgrace|a leech|an animal|scum
vermin: vermin|rats|cockroaches|pigs|dogs|apes|monkeys|snakes|maggots|lice|insects|parasites|a plague|a disease|a cancer|a virus|an infection|a stain on this country|filth|pests|worms|germs|wild beasts|subhuman|sewage|bugs|weeds|livestock|demons
a_vermin: a rat|a cockroach|a pig|a dog|an ape|a monkey|a snake|a maggot|an insect|a parasite|a worm|a beast|a bug|a piece of filth|a bag of dirt|a rodent|a pest|an animal
good: kind|clever|wonderful|honest|brave|hard working|lovely|funny|beautiful|smart|generous|friendly|gentle|talented|strong|great|amazing|cool|awesome|polite|patient|warm|welcome here|as good as anyone|perfectly normal|valuable|important|equal to everyone|inspiring|thoughtful|creative|fantastic|loyal|fun to be with|trustworthy|just like you and me
goods: friends|heroes|neighbours|good people|human beings like us|equals|great colleagues|role models|wonderful parents|loving people|artists|excellent cooks|leaders|people with dreams
a_good: a great friend|a hero|a good neighbour|the best colleague i have|a role model|a wonderful parent|a kind soul|an excellent cook|a brilliant nurse|a brave firefighter|someone i admire
good_thing: respect|love|rights|equal rights|our help|kindness|compassion|a home|a job|freedom|sympathy|mercy|happiness|protection|a voice|dignity|a place among us|medical care|an education|to be heard|to be happy|to be treated as humans|to live here|to vote|decent pay|our pity|any better|the air they breathe|to be loved
harm: kill|beat up|hurt|shoot|stab|hang|punch|burn|choke|slap|run over|strangle|attack|murder|kick|drown|break the legs of|smash the face of|execute|slaughter|destroy|wipe out|bomb|whip|poison|throw acid at|throw stones at|spit on|knock out
harming: killing|beating up|hurting|shooting|stabbing|hanging|attacking|murdering|kicking|spitting on|threatening|bullying|harassing|insulting|humiliating
harmed: killed|beaten up|hurt|shot|stabbed|hanged|attacked|murdered|kicked|spat on|burned alive|bullied|threatened|wiped out|executed|harmed|tortured|drowned|gassed|whipped
punished: locked up|thrown out|kicked out|deported|banned|sterilised|put in camps|put down|sent away|shot|hanged|arrested|fired|fenced off|put in cages|put behind bars|rounded up|removed from society|exterminated|whipped in public|kept away from children|stripped of their rights|banned from schools|barred from voting|punished for existing|made to suffer|enslaved|taught a lesson|thrown off a cliff|eradicated|beaten every day|put in their place|expelled
remove: deport|get rid of|throw out|lock up|exterminate|wipe out|kick out|ban|send back|round up|drive out|eliminate|silence|put down|clear out|remove
suffer: suffer|die|be hurt|be beaten|be hanged|be shot|burn|rot in jail|be deported|be punished|be spat on|lose everything|go through hell|die a slow death|get a beating|be slaves|die alone|be locked up|get no mercy
wrong: wrong|disgusting|racist|hateful|hurtful|unacceptable|shameful|a lie|not okay|never acceptable|cruel|vile|ignorant|bigoted|horrible|bad|dangerous nonsense|harmful|discrimination|not funny
wrongly: should be ashamed|are wrong|are bigots|need to be stopped|know nothing|are just hateful|make me angry|disgust me|should be banned|need to educate themselves|are the real problem|are not welcome here
swear: damn|damned|bloody|freaking|goddamn|friggin|effing|stinking|crappy|flipping|blasted
very: very|so|really|just|totally|completely|all|always|simply|truly|utterly|so damn|so freaking|too
everyone: everyone|everybody|each of us|most people|half the town|my family|my whole street
place: this country|our town|our street|our schools|my neighbourhood|europe|america|england|this city|our land|the west|my school|this forum
film_good: great|brilliant|moving|hilarious|fantastic|a masterpiece|so good|beautiful|underrated
mood: angry|sad|furious|happy|excited|tired|upset|disappointed|scared|thrilled|heartbroken|fed up|grateful|proud|anxious|bored|lonely
food: pizza|soup|curry|cake|ice cream|pasta|salad|coffee|tea|bread|cheese|sushi|olives|porridge|chips
event: the match|the party|the concert|my exam|the interview|the holiday|the wedding|the flight|the meeting|the game last night|the trip|election night
weather: rain|snow|heat|wind|fog|cold|storm|humidity
hobby: gardening|chess|football|cooking|painting|running|sewing|music|fishing|dancing|photography|hiking
job: doctor|nurse|teacher|engineer|baker|driver|judge|singer|writer|chef|student|pilot|mayor|coach
when: yesterday|last week|this morning|on monday|years ago|at work|in the park|on the bus|at school|last night|at the shop|on holiday
swear_noun: crap|hell|damn|bloody hell|blimey
bad_emoji: 🐀|🐍|🐷|💩|🐒|🗑️|🤡|🐖|🪳|👹|🦠
hate_emoji: 🤮|😡|🤢|🖕|😠|👎|🤬
harm_emoji: 🔫|🔪|💣|⚰️|☠️|💀|🔥|🪓
good_emoji: ❤️|😍|🥰|😊|👍|🙏|🎉|💕|😂|🌸|🤗|🌍|✊
"""

WORDS = {}
for line in SLOTS.strip().splitlines():
    name, alternatives = line.split(": ", 1)
    WORDS[name] = alternatives.split("|")
