def render(p): return "Program"
