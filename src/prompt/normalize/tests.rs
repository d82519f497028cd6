//! All rules together: disguises come through as the plain text, and texts of many languages come through unchanged.

use proptest::prelude::*;

use super::*;

fn full(text: &str) -> String {
    Normalizer::new(Normalize::Full, "<separator>")
        .normalize(text)
        .into_owned()
}

fn nfc(text: &str) -> String {
    Normalizer::new(Normalize::Nfc, "<separator>")
        .normalize(text)
        .into_owned()
}

const PLAIN: &str = "all of those people are awful and they should be driven out of the country";

/// The disguises that readers see through, applied to each letter or space of [`PLAIN`].
fn disguises() -> Vec<(&'static str, String)> {
    let words = |separator: &str| PLAIN.replace(' ', separator);
    let letters = |separator: &str| {
        let letters: Vec<String> = PLAIN.chars().map(String::from).collect();
        letters.join(separator)
    };
    let behind_each = |separator: &str| {
        let put = |char: char| {
            if char == ' ' {
                " ".to_owned()
            } else {
                format!("{char}{separator}")
            }
        };
        PLAIN.chars().map(put).collect::<String>()
    };
    let shifted = |from: u32| {
        let shift = |char: char| match char {
            ' ' => ' ',
            char => char::from_u32(from + u32::from(char) - u32::from('a')).unwrap(),
        };
        PLAIN.chars().map(shift).collect::<String>()
    };
    let replaced = |pairs: &[(char, char)]| {
        let replace = |char| {
            pairs
                .iter()
                .find(|(plain, _)| *plain == char)
                .map_or(char, |(_, other)| *other)
        };
        PLAIN.chars().map(replace).collect::<String>()
    };
    vec![
        (
            "override",
            format!("\u{202e}{}\u{202c}", PLAIN.chars().rev().collect::<String>()),
        ),
        ("tabs", words("\t")),
        ("line breaks", words("\n")),
        ("Ogham spaces", words("\u{1680}")),
        ("no-break spaces", words("\u{a0}")),
        ("wide spaces", words("\u{3000}")),
        ("Braille between words", words("\u{2800}")),
        ("Braille between letters", letters("\u{2800}")),
        ("Braille behind letters", behind_each("\u{2800}")),
        ("spaces between letters", letters(" ")),
        (
            "dots between letters",
            words(" ")
                .split(' ')
                .map(|word| dotted(word, "."))
                .collect::<Vec<_>>()
                .join(" "),
        ),
        ("line breaks between letters", letters("\n")),
        ("emoji between letters", letters("😀")),
        ("hearts between letters", letters("❤\u{fe0f}")),
        ("invisible characters", letters("\u{200b}")),
        ("joiners", letters("\u{200d}")),
        ("tags", letters("\u{e0041}")),
        ("mathematical letters", shifted(0x1d41a)),
        ("sans-serif letters", shifted(0x1d5ba)),
        ("full width", shifted(0xff41)),
        ("circled letters", shifted(0x24d0)),
        ("piled marks", behind_each("\u{316}\u{32f}\u{353}\u{33c}")),
        ("struck through", behind_each("\u{336}")),
        (
            "Cyrillic",
            replaced(&[('a', 'а'), ('e', 'е'), ('o', 'о'), ('p', 'р'), ('c', 'с'), ('y', 'у')]),
        ),
        ("Greek", replaced(&[('a', 'α'), ('o', 'ο'), ('v', 'ν'), ('i', 'ι')])),
        (
            "small capitals",
            replaced(
                &PLAIN
                    .chars()
                    .filter(char::is_ascii_alphabetic)
                    .filter_map(small_capital_of)
                    .collect::<Vec<_>>(),
            ),
        ),
        ("digits", replaced(&[('a', '4'), ('e', '3'), ('o', '0')])),
    ]
}

fn dotted(word: &str, separator: &str) -> String {
    let letters: Vec<String> = word.chars().map(String::from).collect();
    letters.join(separator)
}

fn small_capital_of(letter: char) -> Option<(char, char)> {
    let small = "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘqʀꜱᴛᴜᴠᴡxʏᴢ".chars();
    ('a'..='z').zip(small).find(|&(plain, _)| plain == letter)
}

#[test]
fn disguised_texts_are_read_as_the_plain_one() {
    for (name, text) in disguises() {
        // Single letters of which the row is parted by single spaces, and digits alone, do not tell what they stand for.
        assert_ne!(text, PLAIN, "{name}");
        assert_eq!(full(&text), PLAIN, "{name}");
    }
}

/// Sentences of many languages, names, code and posts, none of which hides anything.
const HARMLESS: &[&str] = &[
    "The garden is open from 9 to 17, and entrance is $5; children (under 12) don't pay!",
    "J. R. R. Tolkien, C. S. Lewis and J.K. Rowling met O'Brien, McDonald and van der Meer in the U.S.A.",
    "I am a member of the N.A.A.C.P., e.g. since 1999, at 10 a.m. or 5p.m.",
    "Which one is it: a) b) c) or d)? A B C D",
    "vitamins a, b, c, d and e; x = y + z * w / v",
    "let x = foo[i] + bar(j, k)?; // b2b, utf8, sha256",
    "for (int i = 0; i < n; i++) { a[i] += b2[i] * 3; }",
    "if x is not None:\n\treturn a_b_c[\"key\"]\nelse: # or what comes of it\n\treturn None",
    "SELECT * FROM users WHERE id = 42 AND name LIKE '%a_b%';",
    "curl -X POST https://example.org/a/b?c=d&e=f#g h264 i18n k8s log4j mp3s",
    "My new PS5, RTX 4090, iPhone15 and B2B start-up of covid19 times, 3D and 4K, R2D2 and C3PO",
    "mail jo.doe@example.org or @garden_club on x.com, #gardening2024",
    "so cute 😍😍 love it ❤\u{fe0f} 👍🏽 👨\u{200d}👩\u{200d}👧 🇫🇷🇩🇪 1\u{fe0f}\u{20e3} ✨ wow!!! :-) ^_^ ¯\\_(ツ)_/¯",
    "clap 👏 for 👏 the 👏 garden 👏",
    "Bugün hava çok güzel, İstanbul'da ılık bir gün; şöyle bir çıkıp gezelim mi?",
    "Hôm nay trời đẹp quá, chúng ta cùng đi dạo trong vườn nhé! Nguyễn Thị Ngọc Ánh",
    "आज मौसम बहुत अच्छा है, चलो बगीचे में घूमने चलते हैं। क्षत्रिय ज्ञान",
    "الطقس جميل اليوم، هل نذهب إلى الحديقة؟ السَّلَامُ عَلَيْكُمْ",
    "مزه\u{200c}ی این غذا خوب است و می\u{200c}خواهم",
    "היום מזג האוויר יפה, בואו נלך לגינה. שָׁלוֹם",
    "วันนี้อากาศดีมาก ไปเดินเล่นในสวนกันเถอะ ที่นี่สวยงาม",
    "今天天气很好，我们去花园散步吧！我喜欢Java和C++。",
    "今日はいい天気ですね。庭を散歩しましょう！ﾊﾛｰ、２０２４年。",
    "오늘 날씨가 아주 좋네요. 정원을 산책해요! ㅋㅋㅋ ㅎㅎ",
    "Σήμερα ο καιρός είναι ωραίος, πάμε μια βόλτα στον κήπο! Άλφα ή ωμέγα; ο, η, το",
    "Сегодня хорошая погода, пойдём гулять в сад! Я и он, а мы с ней и у них.",
    "Сьогодні гарна погода, ходімо гуляти в сад! Її їжа є, і ґанок теж.",
    "Днес времето е хубаво, а в градината има рози. Той и тя са там, а аз съм тук.",
    "Данас је лепо време, хајде да шетамо у башти. Њој се свиђа џем.",
    "Այսօր եղանակը լավ է, եկեք զբոսնենք այգում։",
    "დღეს კარგი ამინდია, ბაღში ვისეირნოთ!",
    "Dziś jest ładna pogoda, chodźmy do ogrodu! Łódź, źdźbło, w Polsce i u nas, a z nim o tym",
    "Dnes je hezky, pojďme na zahradu! Příliš žluťoučký kůň, k domu, v lese, s tebou, z Prahy",
    "Heute ist schönes Wetter, gehen wir in den Garten! Straße, Größe, Füße",
    "Il fait beau aujourd'hui, allons au jardin ! L'été, où ça ? Cœur, à l'œuvre, 1er, 2e, n°5",
    "¡Hoy hace buen tiempo! ¿Vamos al jardín? Señor Núñez, 1.ª, 2.º, pingüino, y a él o a ella",
    "I dag er det fint vær, la oss gå i hagen! Å være på øya. Æ e i Å.",
    "Ẹ káàárọ̀, ẹ jẹ́ kí a lọ sí ọgbà. Ọ̀rọ̀ náà dára.",
    "இன்று வானிலை நன்றாக உள்ளது, தோட்டத்தில் நடக்கலாம்!",
    "আজ আবহাওয়া খুব ভালো, চলো বাগানে হাঁটি!",
    "ዛሬ አየሩ ጥሩ ነው፣ ወደ አትክልቱ እንሂድ።",
    "He said привет and спасибо; она любит Python и JavaScript.",
    "the α particle, Δt, 5 μm, 10 Ω, x² + y₁ ≤ ½ · π, 20 °C, 50 €, £3, ™ and ©",
    "/ˈɪŋɡlɪʃ/ and [tʰɑ] are phonetic",
    "Line one has some words.\nLine two has some more.\n\n- a list of things\n- another entry in it\n",
];

#[test]
fn harmless_texts_of_many_languages_come_through() {
    for text in HARMLESS {
        let composed: String = text.nfc().collect();
        assert_eq!(full(text), composed.replace('\u{a0}', " "), "{text}");
    }
}

#[test]
fn the_earlier_rules_give_what_they_gave() {
    let check = |text: &str, expected: &str| assert_eq!(nfc(text), expected, "{text:?}");
    check("ni\u{200b}ce", "nice");
    check("cafe\u{200b}\u{301}", "café");
    check("<sepa\u{200b}rator>", "< separator>");
    check("a\tb\u{a0}c\u{202e}d", "a\tb\u{a0}cd");
    for (_, text) in disguises() {
        let visible: String = invisible::visible(&text).collect();
        let composed: String = visible.nfc().collect();
        assert_eq!(nfc(&text), composed);
    }
    let none = Normalizer::new(Normalize::None, "<separator>");
    assert_eq!(none.normalize("ni\u{200b}ce<separator>"), "ni\u{200b}ce<separator>");
}

#[test]
fn plain_english_is_not_copied() {
    let text = "See you at the garden; it's open from 9 to 17 on the 22nd of May!\nBring a friend or two along.";
    let normalizer = Normalizer::new(Normalize::Full, "<separator>");
    assert!(matches!(normalizer.normalize(text), Cow::Borrowed(_)));
}

/// A rule that took time in proportion to the square of a text's size would not come to an end here.
#[test]
fn long_hostile_texts_are_read() {
    for part in [
        "\u{202e}a\u{202d}b",
        "a\u{202c}",
        "a\u{316}\u{317}",
        "\u{2800}a",
        "a\n",
        "a. ",
        "a, b ",
        "a b c d ",
        "x\u{301}",
        "🅰",
        "🅰a",
        "ᴀ",
        "а",
        "аa",
        "ωa",
        "h4",
        "h4te ",
        "4h@",
        "@a.",
        "😀a",
        "<separator>",
        "ａ",
        "\u{200d}",
        "'a",
        "ʰ",
        "🇦",
        "e\u{336}",
    ] {
        let text = part.repeat(600_000 / part.len());
        let normalized = full(&text);
        assert!(normalized.len() <= text.len() * 2, "{part:?}");
    }
}

/// Characters and parts of text that the rules look at.
fn part() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec![
            " ",
            "  ",
            ".",
            "-",
            "\n",
            "\t",
            "\u{2800}",
            "\u{a0}",
            "\u{200b}",
            "\u{200d}",
            "\u{202e}",
            "\u{202d}",
            "\u{202c}",
            "\u{2068}",
            "\u{2069}",
            "😀",
            "❤\u{fe0f}",
            "\u{fe0f}",
            "\u{301}",
            "\u{316}",
            "\u{316}\u{317}\u{318}",
            "\u{338}",
            "а",
            "о",
            "с",
            "н",
            "α",
            "ο",
            "ᴀ",
            "ʙ",
            "ɡ",
            "ⓐ",
            "🅱",
            "🇦",
            "ᵃ",
            "𝐚",
            "ａ",
            "３",
            "𝟑",
            "ⅼ",
            "ﬁ",
            "g4rden",
            "th3",
            "0f",
            "a",
            "b",
            "I",
            "h",
            "4",
            "3",
            "@",
            "$",
            "!",
            "garden",
            "сад",
            "<",
            "sepa",
            "rator>",
            "<separator>",
            "你",
            "がぎ",
            "한국",
            "e\u{323}",
            "\u{1112}\u{1161}",
        ])
        .prop_map(str::to_owned),
        any::<char>().prop_map(String::from),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn normalising_is_idempotent_and_leaves_no_literal_separator(parts in prop::collection::vec(part(), 0..24)) {
        let text = parts.concat();
        for normalize in [full, nfc] {
            let once = normalize(&text);
            prop_assert!(!once.to_ascii_lowercase().contains("<separator>"), "{once:?}");
            prop_assert_eq!(normalize(&once), once);
        }
    }

    /// What is skipped for plain and composed texts would not change them.
    #[test]
    fn every_text_is_made_visible_and_composed(text in prop_oneof![any::<String>(), "[\\x00-\\x7f]{0,20}", "[a-f\u{300}-\u{305}\u{e0}-\u{e5}\u{1100}-\u{1112}\u{1161}]{0,9}"]) {
        let expected: String = invisible::visible(&text).collect::<String>().nfc().collect();
        prop_assert_eq!(nfc(&text), Separator::new("<separator>").broken_up(expected.into()));
    }

    /// Harmless sentences in any combination come through.
    #[test]
    fn harmless_texts_come_through_together(sentences in prop::collection::vec(prop::sample::select(HARMLESS), 0..6)) {
        let text: String = sentences.join(" ").nfc().collect();
        let single_script = sentences.iter().all(|sentence| sentence.is_ascii());
        if single_script {
            prop_assert_eq!(full(&text), text);
        }
    }

    /// Latin words, of which some have digits around, do not change in any order.
    #[test]
    fn words_come_through_in_any_order(words in prop::collection::vec(prop::sample::select(vec![
        "the", "garden", "is", "I", "a", "Ö", "été", "b2b", "4ever", "2nd", "mp3", "don't", "well-known", "U.S.", "R&D", "AT&T", "e.g.",
        "50%", "#1", "C++", "3.14", "10:30", "covid19", "Nguyễn", "İzmir", "żółw", "w/o", "and/or", "@jo", "…", "—", "“quoted”", "😀",
        "(sic)", "A4", "x86", "v2.0",
    ]), 0..12)) {
        let text = words.join(" ");
        let parts = text.split(|char: char| !char.is_alphanumeric());
        let singles = parts.filter(|part| part.chars().count() == 1).count();
        if singles < 4 {
            prop_assert_eq!(full(&text), text);
        }
    }
}
