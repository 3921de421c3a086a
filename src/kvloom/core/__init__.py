"""The core nouns: entries, tiers, pages, policies, schedule, budget, recipe. torch only."""
