//! The prompts of published models, which `prompt.preset` names.
//!
//! A model expects every character of its prompt, so these texts repeat what the authors published: the model card of
//! ShieldGemma 1 (Zeng et al., "ShieldGemma: Generative AI Content Moderation Based on Gemma", 2024), and the model card
//! of CoPE-A-9B (Zentropi; "CoPE: A Small Language Model for Steerable and Scalable Content Labeling", 2025).

use super::Template;

/// The guidelines of ShieldGemma for content that has only a user's part, by the name that `prompt.policy` gives them.
pub(super) const SHIELDGEMMA_GUIDELINES: [(&str, &str); 4] = [
    (
        "hate",
        "\"No Hate Speech\": The prompt shall not contain or seek generation of content that targeting identity and/or \
         protected attributes (e.g., racial slurs, promotion of discrimination, calls to violence against protected \
         groups) or dehumanizing/belittling/vilifying on the bases of race, ethnicity, religion, disability, age, \
         nationality, veteran status, sexual orientation, gender, gender identity, caste, or any other protected \
         status. We do allow content that includes a reference to a protected individual or group in a positive manner.",
    ),
    (
        "harassment",
        "\"No Harassment\": The prompt shall not contain or seek generation of content that is malicious, intimidating, \
         bullying, or abusive content targeting another individual (e.g., physical threats, denial of tragic events, \
         disparaging victims of violence).",
    ),
    (
        "dangerous",
        "\"No Dangerous Content\": The prompt shall not contain or seek generation of content that harming oneself \
         and/or others (e.g., accessing or building firearms and explosive devices, promotion of terrorism, \
         instructions for suicide).",
    ),
    (
        "sexual",
        "\"No Sexually Explicit Information\": The prompt shall not contain or seek generation of content that contains \
         references to sexual acts or other lewd content (e.g., sexually graphic descriptions, content aimed at causing \
         arousal). Medical or scientific terms related to human anatomy or sex education are permitted.",
    ),
];

/// The line that separates the parts of CoPE-A's prompt. No control token does, so a comment could imitate the prompt.
pub(super) const COPE_A_SEPARATOR: &str = "======";

/// Returns ShieldGemma's prompt for a guideline. Its answers are `Yes` for a violation, and `No`.
///
/// The lines break where those of the prompt pattern in the model card do. The card's code ends the prompt with a line
/// break.
pub(super) fn shieldgemma(guideline: &str) -> Template {
    Template {
        head: "You are a policy expert trying to help determine whether a user prompt is in\n\
               violation of the defined safety policies.\n\n\
               <start_of_turn>\nHuman Question: "
            .to_owned(),
        tail: format!(
            "\n<end_of_turn>\n\n\
             Our safety principle is defined in the below:\n\n\
             * {guideline}\n\n\
             ===\n\n\
             Does the human question violate the above principle? Your answer must start with\n\
             'Yes' or 'No'. And then walk through step by step to be sure we answer\n\
             correctly.\n"
        ),
    }
}

/// Returns CoPE-A's prompt for a policy. Its answers are `1` if the content meets one of the policy's labels, and `0`.
pub(super) fn cope_a(policy: &str) -> Template {
    let policy = policy.trim();
    Template {
        head: format!(
            "INSTRUCTIONS\n============\n\n\
             Examine the given POLICY and determine if the given CONTENT meets the criteria for ANY of the LABELS. \
             Answer \"1\" if yes, and \"0\" if no.\n\n\n\
             POLICY\n======\n\n\
             {policy}\n\n\n\
             CONTENT\n=======\n\n"
        ),
        tail: "\n\n\nANSWER\n======\n\n".to_owned(),
    }
}
