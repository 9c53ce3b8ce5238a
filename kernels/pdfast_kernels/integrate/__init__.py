"""Operations put into models as they are: what is recognised, what runs, what share of the work that is."""
