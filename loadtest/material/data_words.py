"""Words and sentence frames in six languages, from which data_texts.py makes questions and answers."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """What sentences of one language are made of. Frames name their slots {s} subject, {v} verb, {o} object, {w} where
    or when, {a} remark; words are split at the bars."""

    name: str
    share: int
    topics: tuple[str, ...]
    subjects: tuple[str, ...]
    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    places: tuple[str, ...]
    remarks: tuple[str, ...]
    frames: tuple[str, ...]
    questions: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split("|"))


ENGLISH = Language(
    "en",
    40,
    _words(
        "sourdough bread|tide pools|steam engines|night trains|chess openings|"
        "rooftop gardens|glass blowing|fjords|"
        "paper maps|old bridges|honey bees|sailing knots|public libraries|city trams|"
        "mountain huts|wool dyeing|"
        "radio plays|clay ovens|migrating storks|tea ceremonies|vinyl records|salt mines|"
        "lighthouses|wind farms|"
        "crossword puzzles|violin making|street markets|meteor showers|dry stone walls|"
        "compost heaps|canal locks|"
        "sundials|cheese cellars|typewriters|beach glass|orchards|ice skating|"
        "bookbinding|coral reefs|puppet theatre"
    ),
    _words(
        "the old mill|a careful reader|my neighbour|the morning ferry|"
        "an experienced cook|the village council|"
        "a young engineer|the harbour master|every second visitor|the museum's curator|"
        "a retired teacher|"
        "our local baker|the night shift|a patient gardener|the train conductor|"
        "an early frost|the new bridge|"
        "a small team|the first edition|the chief librarian|a curious child|"
        "the weather station|a heavy storm|"
        "the repair shop|a travelling musician|the water company|an honest broker|"
        "the evening class|my aunt’s dog"
    ),
    _words(
        "repairs|measures|forgets|collects|describes|carries|prefers|replaces|studies|"
        "sells|protects|remembers|"
        "discovers|avoids|needs|changes|improves|follows|paints|counts|borrows|explains|"
        "guards|delays|supports"
    ),
    _words(
        "three wooden crates|the oldest maps|a bag of flour|the narrow staircase|"
        "fresh apricots|the broken clock|"
        "an unusual pattern|the lower shelves|several notebooks|the copper pipes|"
        "a handful of seeds|the long queue|"
        "a box of letters|the northern wall|two spare wheels|the daily reports|"
        "a bright lantern|the entire harvest|"
        "an empty barrel|the signal lamps|cheap umbrellas|the visitors’ book|"
        "a roll of cloth|the loose tiles|"
        "cold meltwater|the winter timetable|a pair of gloves|the last sandwich|"
        "thick woollen socks|the toll gate"
    ),
    _words(
        "before sunrise|near the market square|in late October|behind the station|"
        "on quiet Sundays|after the concert|"
        "along the river|during the holidays|at the edge of town|under the plane trees|"
        "once a month|in heavy rain|"
        "without much noise|for almost ten years|between two meetings|on the upper deck|"
        "in a friend’s kitchen"
    ),
    _words(
        "which surprised nobody|although it costs more|because the light is better|"
        "as far as anyone knows|"
        "and that saves time|if the weather holds|so the neighbours complain|while the others wait|"
        "though few people notice|since the roof was mended|unless somebody asks first|"
        "just like last year"
    ),
    (
        "{S} {v} {o} {w}.",
        "{W}, {s} {v} {o}, {a}.",
        "{S} {v} {o}, {a}.",
        "It is often said that {s} {v} {o} {w}.",
        "If you ask around, {s} rarely {v} {o} {w}; {s2} does, {a}.",
        "Not only {s}, but also {s2} {v} {o}!",
        "What matters is that {s} {v} {o} {w}, {a}.",
        "Still, {s2} {v} {o2} {w} (and sometimes {o}).",
    ),
    (
        "What should I know about {t} and {o}?",
        "Tell me why {s} {v} {o} {w}.",
        "Can you explain {t} to {s}? Mention {o}.",
        "Write a short note on {t} {w}.",
        "How do {t} change when {s} {v} {o}?",
        "I read that {s} {v} {o} {w}. Is that true, and what has it to do with {t}?",
        "Summarise what people say about {t}, {o} and {s}.",
        "Give me advice: {s} {v} {o}, {a}.",
    ),
)
GERMAN = Language(
    "de",
    10,
    _words(
        "Brückenbau|Zugvögel|Käsereifung|Hüttenwanderungen|Möbelrestaurierung|"
        "Leuchttürme|Straßenmusik|Bücherkisten"
    ),
    _words(
        "der Müller|die Nachbarin|ein müder Läufer|die Gärtnerin|der Bürgermeister|"
        "das Museum|eine Schülerin|"
        "der Fährmann|die Köchin|ein alter Kapitän|das Orchester|die Straßenbahn|der Förster|eine Ärztin"
    ),
    _words(
        "prüft|sammelt|verkauft|vergisst|schützt|ändert|öffnet|zählt|erklärt|braucht|trägt|malt|überquert|mag"
    ),
    _words(
        "die grünen Äpfel|den größten Koffer|ein dünnes Heft|die Bücher aus dem Keller|"
        "den kürzesten Weg|"
        "frische Brötchen|das Geländer|die Schlüssel|eine Kiste voll Nägel|"
        "das schöne Gemälde|die Türen|zwei Körbe"
    ),
    _words(
        "am frühen Morgen|hinter der Mühle|über den Dächern|im März|während der Prüfung|"
        "nach dem Frühstück|"
        "auf der Brücke|für ein paar Stunden|in der Küche|trotz der Kälte|ohne große Mühe"
    ),
    _words(
        "was niemanden überrascht|obwohl es später regnet|weil die Straße gesperrt ist|wie jedes Jahr|"
        "damit alle Gäste Platz finden|bevor die Läden schließen|soweit man hört"
    ),
    (
        "Meistens, so heißt es, {v} {s} {o} {w}.",
        "{W} {v} {s} {o}, {a}.",
        "{S} {v} {o} {w}, {a}.",
        "Natürlich {v} {s} auch {o}, {a}.",
        "{S} {v} {o} und {s2} {v} {o2} {w}!",
    ),
    (
        "Warum {v} {s} {o} {w}?",
        "Was weißt du über {t} und {o}?",
        "Erkläre {t} so, dass es {s} {w} versteht.",
        "Schreibe ein paar Sätze über {t}: {s} {v} {o}.",
    ),
)
FRENCH = Language(
    "fr",
    10,
    _words(
        "la pêche à pied|les vélos anciens|le théâtre d'été|les écluses|la forêt brûlée|"
        "les marchés de Noël|la mosaïque"
    ),
    _words(
        "le boulanger|une élève curieuse|mon frère aîné|la bibliothécaire|un pêcheur âgé|"
        "le maître d'école|"
        "l'équipe de nuit|la fermière|un étudiant pressé|le musée|ma voisine|"
        "le chef d'orchestre|une infirmière"
    ),
    _words(
        "répare|préfère|achète|éclaire|protège|décrit|oublie|mène|complète|révèle|emporte|découvre|célèbre"
    ),
    _words(
        "la clé du grenier|trois pommes mûres|les fenêtres cassées|un café brûlant|"
        "des légumes frais|la vieille échelle|"
        "le câble électrique|les poèmes oubliés|une forêt entière|les étagères basses|"
        "le gâteau d'à côté|deux bouées"
    ),
    _words(
        "à l'aube|près de la rivière|après le dîner|en février|derrière l'église|"
        "pendant l'été|au bout du quai|"
        "sans aucun problème|dès le premier jour|à côté du théâtre|là où tout a commencé"
    ),
    _words(
        "ce qui étonne les invités|même s'il fait très froid|"
        "parce que la lumière décroît|où personne ne va|"
        "bien que le prix ait augmenté|comme l'année dernière|à condition d'être prêt"
    ),
    (
        "{S} {v} {o} {w}.",
        "{W}, {s} {v} {o}, {a}.",
        "On dit souvent que {s} {v} {o} {w}, {a}.",
        "Même {s2} {v} {o2}, {a} !",
        "Après tout, {s} {v} {o} et {s2} {v} {o2} {w}.",
    ),
    (
        "Pourquoi {s} {v} {o} {w} ?",
        "Que sait-on de {t} et de {o} ?",
        "Écris quelques phrases sur {t} : {s} {v} {o}.",
        "Explique {t} comme si {s} t'écoutait {w}.",
    ),
)
SPANISH = Language(
    "es",
    8,
    _words(
        "los trenes de montaña|el baile español|las colmenas|la cerámica|"
        "los niños y el ajedrez|las estaciones del año"
    ),
    _words(
        "el panadero|una niña valiente|mi compañero|la señora Ibáñez|el capitán|"
        "un músico callejero|la dueña del jardín|"
        "el médico rural|una bióloga|el equipo técnico|la niñera|un peregrino"
    ),
    _words("repara|compró|olvidó|enseñó|midió|dibujó|cuidó|sueña con|describió|rompió|vendió|llenó"),
    _words(
        "las montañas de papel|el último autobús|una caña de azúcar|los pañuelos rojos|"
        "la lámpara pequeña|el árbol caído|"
        "tres jabones|la música de otoño|los baños públicos|un sueño antiguo|las canciones más lentas"
    ),
    _words(
        "al amanecer|cerca del río Miño|después de la reunión|en mañanas frías|"
        "detrás del almacén|durante el otoño|"
        "a través del valle|sin pedir permiso|más allá del jardín|según el periódico"
    ),
    _words(
        "aunque nadie lo creyó|porque así es más fácil|como cada año|"
        "si el clima lo permite|para que todos estén cómodos|"
        "lo que causó risa"
    ),
    (
        "{S} {v} {o} {w}.",
        "{W}, {s} {v} {o}, {a}.",
        "Dicen que {s} {v} {o} {w}, {a}.",
        "¡Hasta {s2} {v} {o2}, {a}!",
        "Además, {s} {v} {o} y {s2} {v} {o2} {w}.",
    ),
    (
        "¿Por qué {s} {v} {o} {w}?",
        "¿Qué se sabe de {t} y {o}?",
        "Escribe unas líneas sobre {t}: {s} {v} {o}.",
        "¿Cómo explicarías {t} a {s} {w}?",
    ),
)
RUSSIAN = Language(
    "ru",
    6,
    _words("старые мосты|ночные поезда|северные озёра|уличные шахматы|деревянные лодки|музейные часы"),
    _words(
        "старый мастер|моя соседка|молодой инженер|капитан парома|внимательный читатель|"
        "дежурный врач|учительница|"
        "садовник|почтальон|наша команда|сторож"
    ),
    _words("чинит|собирает|продаёт|считает|забывает|защищает|рисует|изучает|объясняет|находит|выбирает"),
    _words(
        "свежий хлеб|три ящика яблок|длинное письмо|сломанный фонарь|зимнее расписание|"
        "медные трубы|пустую бочку|"
        "тёплые варежки|узкую лестницу|редкие книги|весь урожай"
    ),
    _words(
        "на рассвете|у самой реки|в конце октября|за вокзалом|после концерта|"
        "во время каникул|под старыми липами|"
        "раз в месяц|почти без шума"
    ),
    _words(
        "что никого не удивляет|хотя это дороже|потому что так светлее|"
        "если позволит погода|как и в прошлом году|"
        "пока другие ждут"
    ),
    (
        "{S} {v} {o} {w}.",
        "{W} {s} {v} {o}, {a}.",
        "Говорят, что {s} {v} {o} {w}, {a}.",
        "Даже {s2} {v} {o2}, {a}!",
        "К тому же {s} {v} {o}, а {s2} {v} {o2} {w}.",
    ),
    (
        "Почему {s} {v} {o} {w}?",
        "Что известно про {t} и {o}?",
        "Напиши несколько фраз про {t}: {s} {v} {o}.",
        "Объясни, как связаны {t} и {o}, {a}.",
    ),
)
CHINESE = Language(
    "zh",
    10,
    _words("古桥修复|夜间列车|茶文化|候鸟迁徙|屋顶花园|手工造纸|城市电车|山间小屋|皮影戏|盐湖"),
    _words(
        "老木匠|我的邻居|年轻的工程师|图书管理员|渡船船长|村里的医生|细心的读者|博物馆馆长|退休教师|值夜班的同事|"
        "卖水果的阿姨|气象站"
    ),
    _words("修理|收集|描述|保护|忘记|研究|出售|测量|更换|发现|记录|喜欢"),
    _words(
        "三箱苹果|最旧的地图|一袋面粉|坏掉的时钟|狭窄的楼梯|新鲜的蔬菜|冬季时刻表|铜制的水管|一盒书信|全部的收成|"
        "备用的车轮|温暖的手套|空木桶"
    ),
    _words(
        "在日出之前|在市场附近|十月下旬|在车站后面|音乐会结束以后|沿着河边|放假期间|在城市边缘|每个月一次|下大雨的时候"
    ),
    _words(
        "这并不让人意外|虽然价格更高|因为那里光线更好|如果天气允许|就像去年一样|而其他人还在等待|只是很少有人注意到"
    ),
    (
        "{s}{w}{v}{o}。",
        "{w}，{s}{v}{o}，{a}。",
        "据说{s}常常{v}{o}，{a}。",
        "{s}{v}{o}，而{s2}{w}{v}{o2}。",
        "连{s2}也{v}{o2}，{a}！",
    ),
    (
        "为什么{s}{w}{v}{o}？",
        "请介绍一下{t}和{o}。",
        "关于{t}，{s}为什么要{v}{o}？请写几句话。",
        "怎样向{s}解释{t}？{a}。",
    ),
)
LANGUAGES: tuple[Language, ...] = (ENGLISH, GERMAN, FRENCH, SPANISH, RUSSIAN, CHINESE)

TABLES: Mapping[str, tuple[str, tuple[str, ...], str, str, tuple[str, ...]]] = {
    "shop": (
        "fruit",
        _words(
            "Apple|Kiwi|Melon|Papaya|Olive|Quince|Cherry|Plum|Fig|Mango|Lemon|Pear|Grape|Peach|Lime|Guava"
        ),
        "price",
        "colour",
        _words("Teal|Beige|Gold|Ivory|White|Black|Silver|Coral|Amber|Navy|Olive green|Rose"),
    ),
    "crew": (
        "name",
        _words("Paul|Jonas|Ida|Ben|Ivan|Mara|Olga|Yusuf|Chen|Aiko|Lena|Tomas|Nadia|Hugo|Zoe|Ravi"),
        "age",
        "city",
        _words("Tokyo|Madrid|London|Seoul|Milan|Geneva|Oslo|Lima|Cairo|Quito|Dublin|Porto"),
    ),
    "fleet": (
        "ship",
        _words("Aurora|Borealis|Calypso|Dorado|Esmeralda|Fortuna|Galatea|Hesper|Iris|Juno|Kestrel|Lyra"),
        "speed",
        "harbour",
        _words("Bergen|Genoa|Split|Cádiz|Gdynia|Odense|Brest|Riga|Turku|Kiel|Ghent|Hull"),
    ),
}
"""Table name: key column, keys, number column, label column, labels."""
